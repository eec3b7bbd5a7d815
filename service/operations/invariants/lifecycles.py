"""Rows against the events that tell how they came to be.

Events of one run are ordered by id: each was inserted under the lock of the run's row.
"""

from service.operations.invariants.rules import Rule

_RUN_EVENTS = """
WITH told AS (
    SELECT id, study_id, run_id, attempt, payload, substr(type, 5) AS state,
           coalesce(lag(substr(type, 5)) OVER w, '') AS before,
           lead(id) OVER w IS NULL AS is_last
    FROM warmscale.events
    WHERE type LIKE 'run.%' AND substr(type, 5) = ANY(:run_states)
    WINDOW w AS (PARTITION BY run_id ORDER BY id)
)
"""

_STUDY_EVENTS = """
WITH told AS (
    SELECT id, study_id, substr(type, 7) AS state,
           coalesce(replace(lag(substr(type, 7)) OVER w, 'created', 'active'), '') AS before,
           lead(id) OVER w IS NULL AS is_last
    FROM warmscale.events
    WHERE type LIKE 'study.%' AND substr(type, 7) = ANY(:study_states)
    WINDOW w AS (PARTITION BY study_id ORDER BY id)
)
"""

RULES = (
    Rule(
        invariant="finished-runs-stand",
        given=_RUN_EVENTS,
        query="""
SELECT study_id, run_id, format('event %s: %s after %s', id, state, before)
FROM told WHERE before = ANY(:final_run_states)
""",
    ),
    Rule(
        invariant="lifecycle-kept",
        given=_RUN_EVENTS,
        query="""
SELECT study_id, run_id,
    format('event %s: %s after %s', id, state, coalesce(nullif(before, ''), 'nothing'))
FROM told
WHERE NOT before = ANY(:final_run_states)
  AND (before, state) NOT IN (
    SELECT * FROM unnest(CAST(:run_from AS text[]), CAST(:run_to AS text[]))
)
""",
    ),
    Rule(
        invariant="finished-runs-stand",
        given=_RUN_EVENTS,
        query="""
SELECT r.study_id, r.id,
    format('it ended as %s at attempt %s, loss %s, error %s; the row says %s, %s, %s, %s',
        told.state, told.attempt, told.payload ->> 'val_loss_nats', told.payload ->> 'error',
        r.state, r.attempt, r.val_loss_nats, r.error)
FROM warmscale.runs r JOIN told ON told.run_id = r.id AND told.is_last
WHERE told.state = ANY(:final_run_states) AND (
    told.state <> r.state OR told.attempt <> r.attempt
    OR told.payload ? 'outcome' AND (
        (told.payload ->> 'val_loss_nats')::float8 IS DISTINCT FROM r.val_loss_nats
        OR told.payload ->> 'error' IS DISTINCT FROM r.error
        OR (told.payload ->> 'outcome' = 'diverged') <> r.diverged
    )
)
""",
    ),
    Rule(
        invariant="lifecycle-kept",
        given=_RUN_EVENTS,
        query="""
SELECT r.study_id, r.id,
    format('the row says %s, its last event %s', r.state, coalesce(told.state, 'nothing'))
FROM warmscale.runs r LEFT JOIN told ON told.run_id = r.id AND told.is_last
WHERE told.state IS DISTINCT FROM r.state AND NOT coalesce(told.state, '') = ANY(:final_run_states)
""",
    ),
    Rule(
        invariant="lifecycle-kept",
        query="""
SELECT study_id, id, format('%s, finished at %s', state, coalesce(finished_at::text, 'no time'))
FROM warmscale.runs WHERE (state = ANY(:final_run_states)) <> (finished_at IS NOT NULL)
""",
    ),
    Rule(
        invariant="lifecycle-kept",
        given=_STUDY_EVENTS,
        query="""
SELECT study_id, NULL,
    format('event %s: %s after %s', id, state, coalesce(nullif(before, ''), 'nothing'))
FROM told
WHERE (before, state) NOT IN (
    SELECT * FROM unnest(CAST(:study_from AS text[]), CAST(:study_to AS text[]))
)
""",
    ),
    Rule(
        invariant="lifecycle-kept",
        given=_STUDY_EVENTS,
        query="""
SELECT s.id, NULL,
    format('the row says %s, its last event %s', s.state, coalesce(told.state, 'nothing'))
FROM warmscale.studies s LEFT JOIN told ON told.study_id = s.id AND told.is_last
WHERE replace(told.state, 'created', 'active') IS DISTINCT FROM s.state
""",
    ),
    Rule(
        invariant="lifecycle-kept",
        query="""
SELECT s.id, r.id, format('the study is %s, the run %s', s.state, r.state)
FROM warmscale.studies s JOIN warmscale.runs r ON r.study_id = s.id
WHERE s.state IN ('completed', 'cancelled', 'failed')
  AND (r.launch = 0 OR s.state = 'cancelled') AND NOT r.state = ANY(:final_run_states)
""",
    ),
)
