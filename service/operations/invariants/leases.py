"""Leases: one at a time, and nothing written under one that is over.

An attempt's span is from its `run.leased` to the event that ended it. A checkpoint's event has its
place in that order. A measurement has its time alone: the start of its transaction, by the clock of
the database, which is after the lease's event and before the end's, as both held the row's lock.
"""

from service.operations.invariants.rules import Rule

_SPANS = """
WITH spans AS (
    SELECT run_id, attempt,
           min(id) FILTER (WHERE type = 'run.leased') AS began,
           min(created_at) FILTER (WHERE type = 'run.leased') AS began_at,
           min(id) FILTER (WHERE type <> 'run.leased') AS ended,
           min(created_at) FILTER (WHERE type <> 'run.leased') AS ended_at,
           (array_agg(substr(type, 5) ORDER BY id) FILTER (WHERE type <> 'run.leased'))[1] AS state
    FROM warmscale.events
    WHERE type LIKE 'run.%' AND substr(type, 5) = ANY(:run_states) AND attempt IS NOT NULL
    GROUP BY run_id, attempt
)
"""

_MEASURED = """
, written AS (
    SELECT run_id, attempt, min(created_at) AS first_at, max(created_at) AS last_at
    FROM warmscale.measurements GROUP BY run_id, attempt
)
SELECT r.study_id, r.id,
    format('measurements of attempt %s from %s to %s; it was leased from %s to %s',
        w.attempt, w.first_at, w.last_at,
        coalesce(s.began_at::text, 'never'), coalesce(s.ended_at::text, 'now'))
FROM written w JOIN warmscale.runs r ON r.id = w.run_id
LEFT JOIN spans s ON s.run_id = w.run_id AND s.attempt = w.attempt
"""

RULES = (
    Rule(
        invariant="one-lease",
        query="""
SELECT study_id, id,
    format('%s, lease until %s, %s', state, coalesce(lease_expires_at::text, 'never'),
        CASE WHEN lease_token IS NULL THEN 'no token' ELSE 'a token' END)
FROM warmscale.runs
WHERE (state = 'leased') <> (lease_expires_at IS NOT NULL)
   OR state = 'leased' AND lease_token IS NULL OR state = 'queued' AND lease_token IS NOT NULL
""",
    ),
    Rule(
        invariant="one-lease",
        query="""
SELECT min(study_id), min(id),
    format('%s runs share a lease''s token: %s', count(*), string_agg(id, ', '))
FROM warmscale.runs WHERE lease_token IS NOT NULL GROUP BY lease_token HAVING count(*) > 1
""",
    ),
    Rule(
        invariant="one-lease",
        query="""
SELECT study_id, run_id, format('lease %s has attempt %s', place, coalesce(attempt::text, 'none'))
FROM (
    SELECT study_id, run_id, attempt, row_number() OVER (PARTITION BY run_id ORDER BY id) AS place
    FROM warmscale.events WHERE type = 'run.leased'
) leased WHERE attempt IS DISTINCT FROM place
""",
    ),
    Rule(
        invariant="one-lease",
        query="""
SELECT r.study_id, r.id,
    format('attempt %s, %s of at most %s failures; events tell of %s leases, %s failures',
        r.attempt, r.failures, r.max_attempts, count(e.id) FILTER (WHERE e.type = 'run.leased'),
        count(e.id) FILTER (WHERE e.payload ->> 'outcome' = 'failed'))
FROM warmscale.runs r LEFT JOIN warmscale.events e ON e.run_id = r.id
GROUP BY r.id
HAVING r.attempt <> count(e.id) FILTER (WHERE e.type = 'run.leased')
    OR r.failures <> count(e.id) FILTER (WHERE e.payload ->> 'outcome' = 'failed')
    OR r.failures > r.max_attempts
""",
    ),
    Rule(
        invariant="no-stale-write",
        given=_SPANS,
        query="""
SELECT e.study_id, e.run_id,
    format('event %s: checkpoint of step %s under attempt %s, which was leased from event %s to %s',
        e.id, e.payload ->> 'step', e.attempt,
        coalesce(s.began::text, 'none'), coalesce(s.ended::text, 'now'))
FROM warmscale.events e LEFT JOIN spans s ON s.run_id = e.run_id AND s.attempt = e.attempt
WHERE e.type = 'run.checkpoint' AND (e.id BETWEEN s.began AND coalesce(s.ended, e.id)) IS NOT TRUE
""",
    ),
    Rule(
        invariant="no-stale-write",
        query="""
SELECT r.study_id, r.id,
    format('checkpoint %s of attempt %s, step %s, without its event', c.id, c.attempt, c.step)
FROM warmscale.checkpoints c JOIN warmscale.runs r ON r.id = c.run_id
WHERE NOT EXISTS (
    SELECT FROM warmscale.events e
    WHERE e.run_id = c.run_id AND e.type = 'run.checkpoint'
      AND e.attempt = c.attempt AND (e.payload ->> 'step')::bigint = c.step
)
""",
    ),
    Rule(
        invariant="no-stale-write",
        given=_SPANS + _MEASURED,
        query="""
WHERE (w.first_at >= s.began_at) IS NOT TRUE
   OR w.last_at > s.ended_at AND NOT s.state = ANY(:final_run_states)
""",
    ),
    Rule(
        invariant="finished-runs-stand",
        given=_SPANS + _MEASURED,
        query="""
WHERE w.last_at > s.ended_at AND s.state = ANY(:final_run_states)
""",
    ),
)
