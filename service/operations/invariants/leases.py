"""Rules on leases: a run has one lease at a time, and an expired lease writes nothing."""

from service.operations.invariants.rules import Rule

# An attempt's span goes from its `run.leased` event to the event that ended it. For example
#     12 run.leased attempt 1 | 15 run.queued attempt 1 (released) | 18 run.leased attempt 2
# gives attempt 1 the span 12 to 15, and attempt 2 the span 18 to NULL: it still runs.
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

# A checkpoint has an event of its own and its place in the order of ids. A measurement has only its
# time, the start of its transaction by the database's clock. That time is after the lease's event
# and before the event of the end, because every one of these transactions locks the run's row.
_MEASURED = """
, written AS (
    SELECT run_id, attempt, min(created_at) AS first_at, max(created_at) AS last_at
    FROM warmscale.measurements GROUP BY run_id, attempt
)
SELECT r.study_id, r.id,
    format('attempt %s has measurements from %s to %s, but its lease lasted from %s to %s',
        w.attempt, w.first_at, w.last_at,
        coalesce(s.began_at::text, 'never'), coalesce(s.ended_at::text, 'now'))
FROM written w JOIN warmscale.runs r ON r.id = w.run_id
LEFT JOIN spans s ON s.run_id = w.run_id AND s.attempt = w.attempt
"""

RULES = (
    # A lease is a token and a time of expiry. A leased run has both. A queued run has neither; an
    # ended run keeps its token, so that the worker can send its last report again.
    Rule(
        invariant="one-lease",
        query="""
SELECT study_id, id,
    format('the run is %s, its lease expires at %s, and it has %s lease token', state,
        coalesce(lease_expires_at::text, 'no time'),
        CASE WHEN lease_token IS NULL THEN 'no' ELSE 'a' END)
FROM warmscale.runs
WHERE (state = 'leased') <> (lease_expires_at IS NOT NULL)
   OR state = 'leased' AND lease_token IS NULL OR state = 'queued' AND lease_token IS NOT NULL
""",
    ),
    Rule(
        invariant="one-lease",
        query="""
SELECT min(study_id), min(id),
    format('%s runs have the same lease token: %s', count(*), string_agg(id, ', '))
FROM warmscale.runs WHERE lease_token IS NOT NULL GROUP BY lease_token HAVING count(*) > 1
""",
    ),
    # The leases of a run are attempts 1, 2, 3, ... in the order of their events.
    Rule(
        invariant="one-lease",
        query="""
SELECT study_id, run_id,
    format('lease number %s has attempt %s', place, coalesce(attempt::text, 'none'))
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
    format('the row has attempt %s, %s failures (at most %s); the events, %s leases, %s failures',
        r.attempt, r.failures, r.max_attempts, count(e.id) FILTER (WHERE e.type = 'run.leased'),
        count(e.id) FILTER (WHERE e.payload ->> 'outcome' = 'failed'))
FROM warmscale.runs r LEFT JOIN warmscale.events e ON e.run_id = r.id
GROUP BY r.id
HAVING r.attempt <> count(e.id) FILTER (WHERE e.type = 'run.leased')
    OR r.failures <> count(e.id) FILTER (WHERE e.payload ->> 'outcome' = 'failed')
    OR r.failures > r.max_attempts
""",
    ),
    # `IS NOT TRUE` also catches an attempt without a span: its comparison is NULL.
    Rule(
        invariant="no-stale-write",
        given=_SPANS,
        query="""
SELECT e.study_id, e.run_id,
    format('event %s: checkpoint of step %s by attempt %s, with a lease from event %s to %s',
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
    format('checkpoint %s of attempt %s, step %s, has no event', c.id, c.attempt, c.step)
FROM warmscale.checkpoints c JOIN warmscale.runs r ON r.id = c.run_id
WHERE NOT EXISTS (
    SELECT FROM warmscale.events e
    WHERE e.run_id = c.run_id AND e.type = 'run.checkpoint'
      AND e.attempt = c.attempt AND (e.payload ->> 'step')::bigint = c.step
)
""",
    ),
    # A measurement before the attempt's lease, or after its end, is a stale write. After a final
    # end it also changed a finished run: the next rule reports it under that name.
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
