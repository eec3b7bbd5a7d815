"""Rules on states: rows agree with the events that changed them, and every change is allowed.

Events of a run are ordered by id: each was inserted under the lock of the run's row.
"""

from service.operations.invariants.rules import Rule

# Each event that changes a state, with the state before it. For example the events run.queued,
# run.leased, run.succeeded become
#     '' -> queued | queued -> leased | leased -> succeeded (is_last)
# and a rule compares each pair with the allowed transitions, or the last state with the row.
_RUN_EVENTS = """
WITH changes AS (
    SELECT id, study_id, run_id, attempt, payload, substr(type, 5) AS state,
           coalesce(lag(substr(type, 5)) OVER w, '') AS before,
           lead(id) OVER w IS NULL AS is_last
    FROM warmscale.events
    WHERE type LIKE 'run.%' AND substr(type, 5) = ANY(:run_states)
    WINDOW w AS (PARTITION BY run_id ORDER BY id)
)
"""

# The same of studies. A study's first event is study.created; its state is active from then on.
_STUDY_EVENTS = """
WITH changes AS (
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
SELECT study_id, run_id, format('event %s: the run is %s after it had ended as %s',
    id, state, before)
FROM changes WHERE before = ANY(:final_run_states)
""",
    ),
    Rule(
        invariant="lifecycle-kept",
        given=_RUN_EVENTS,
        query="""
SELECT study_id, run_id, format('event %s: a run must not be %s after %s',
    id, state, coalesce(nullif(before, ''), 'nothing'))
FROM changes
WHERE NOT before = ANY(:final_run_states)
  AND (before, state) NOT IN (
    SELECT * FROM unnest(CAST(:run_from AS text[]), CAST(:run_to AS text[]))
)
""",
    ),
    # Only an end that a worker reported has an outcome, and with it a loss or an error. A cancelled
    # run and a run whose lease expired have none: compare only state and attempt.
    Rule(
        invariant="finished-runs-stand",
        given=_RUN_EVENTS,
        query="""
SELECT r.study_id, r.id,
    format('the last event says %s at attempt %s, loss %s, error %s; the row has %s, %s, %s, %s',
        changes.state, changes.attempt, changes.payload ->> 'val_loss_nats',
        changes.payload ->> 'error', r.state, r.attempt, r.val_loss_nats, r.error)
FROM warmscale.runs r JOIN changes ON changes.run_id = r.id AND changes.is_last
WHERE changes.state = ANY(:final_run_states) AND (
    changes.state <> r.state OR changes.attempt <> r.attempt
    OR changes.payload ? 'outcome' AND (
        (changes.payload ->> 'val_loss_nats')::float8 IS DISTINCT FROM r.val_loss_nats
        OR changes.payload ->> 'error' IS DISTINCT FROM r.error
        OR (changes.payload ->> 'outcome' = 'diverged') <> r.diverged
    )
)
""",
    ),
    Rule(
        invariant="lifecycle-kept",
        given=_RUN_EVENTS,
        query="""
SELECT r.study_id, r.id,
    format('the row is %s, the last event says %s', r.state, coalesce(changes.state, 'nothing'))
FROM warmscale.runs r LEFT JOIN changes ON changes.run_id = r.id AND changes.is_last
WHERE changes.state IS DISTINCT FROM r.state
  AND NOT coalesce(changes.state, '') = ANY(:final_run_states)
""",
    ),
    Rule(
        invariant="lifecycle-kept",
        query="""
SELECT study_id, id,
    format('the run is %s, and finished_at is %s', state, coalesce(finished_at::text, 'not set'))
FROM warmscale.runs WHERE (state = ANY(:final_run_states)) <> (finished_at IS NOT NULL)
""",
    ),
    Rule(
        invariant="lifecycle-kept",
        given=_STUDY_EVENTS,
        query="""
SELECT study_id, NULL, format('event %s: a study must not be %s after %s',
    id, state, coalesce(nullif(before, ''), 'nothing'))
FROM changes
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
    format('the row is %s, the last event says %s', s.state, coalesce(changes.state, 'nothing'))
FROM warmscale.studies s LEFT JOIN changes ON changes.study_id = s.id AND changes.is_last
WHERE replace(changes.state, 'created', 'active') IS DISTINCT FROM s.state
""",
    ),
    # A target that a user starts by hand (launch > 0) may train after its study has completed.
    # Only a cancellation ends it too.
    Rule(
        invariant="lifecycle-kept",
        query="""
SELECT s.id, r.id, format('the study is %s, but this run is still %s', s.state, r.state)
FROM warmscale.studies s JOIN warmscale.runs r ON r.study_id = s.id
WHERE s.state IN ('completed', 'cancelled', 'failed')
  AND (r.launch = 0 OR s.state = 'cancelled') AND NOT r.state = ANY(:final_run_states)
""",
    ),
)
