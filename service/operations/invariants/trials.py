"""Rules on trials: each counts once, and Optuna's tables agree with ours.

The service writes both schemas in one transaction: the start of a trial and the end that a worker
reports (decision 0024). Only an end without a worker's report may be missing in Optuna: the end of
a cancelled run, or after the last lease of a run expired. The next lease request finishes that
trial.
"""

from service.operations.invariants.rules import Rule

# Each trial run beside its Optuna trial, with the state that Optuna should have. For example
#     succeeded -> COMPLETE | pruned, or failed with `diverged` -> PRUNED | failed -> FAIL
# and every run that has not ended: RUNNING.
_PAIRS = """
WITH pairs AS (
    SELECT r.*, t.trial_id, t.state::text AS optuna_state, v.value,
           CASE WHEN r.state = 'succeeded' THEN 'COMPLETE'
                WHEN r.state = 'pruned' OR r.diverged THEN 'PRUNED'
                WHEN r.state = ANY(:final_run_states) THEN 'FAIL'
                ELSE 'RUNNING' END AS expected
    FROM warmscale.runs r
    JOIN warmscale.studies s ON s.id = r.study_id
    JOIN optuna.studies o ON o.study_name = s.optuna_name
    JOIN optuna.trials t ON t.study_id = o.study_id AND t.number = r.trial_number
    LEFT JOIN optuna.trial_values v ON v.trial_id = t.trial_id AND v.objective = 0
    WHERE r.kind = 'trial'
)
"""

_ORPHANS = """
SELECT s.id, NULL, format('trial %s is %s in Optuna and has no run', t.number, t.state)
FROM warmscale.studies s
JOIN optuna.studies o ON o.study_name = s.optuna_name
JOIN optuna.trials t ON t.study_id = o.study_id
WHERE NOT EXISTS (
    SELECT FROM warmscale.runs r WHERE r.study_id = s.id AND r.trial_number = t.number
)
"""

RULES = (
    Rule(
        invariant="trials-count-once",
        query="""
SELECT s.id, NULL,
    format('the study has %s trials and a budget of %s', count(*), s.spec -> 'hpo' ->> 'trials')
FROM warmscale.studies s JOIN warmscale.runs r ON r.study_id = s.id AND r.kind = 'trial'
GROUP BY s.id HAVING count(*) > (s.spec -> 'hpo' ->> 'trials')::bigint
""",
    ),
    Rule(
        invariant="trials-count-once",
        query="""
SELECT s.id, NULL,
    format('the study is completed, but only %s of its %s trials have ended',
        count(r.id), s.spec -> 'hpo' ->> 'trials')
FROM warmscale.studies s
LEFT JOIN warmscale.runs r
    ON r.study_id = s.id AND r.kind = 'trial' AND r.state = ANY(:final_run_states)
WHERE s.state = 'completed'
GROUP BY s.id HAVING count(r.id) < (s.spec -> 'hpo' ->> 'trials')::bigint
""",
    ),
    Rule(
        invariant="trials-count-once",
        query="""
SELECT study_id, min(id),
    format('trial %s has %s runs: %s', trial_number, count(*), string_agg(id, ', '))
FROM warmscale.runs WHERE kind = 'trial' GROUP BY study_id, trial_number HAVING count(*) > 1
""",
    ),
    Rule(
        invariant="trials-count-once",
        query="""
SELECT r.study_id, r.id, format('trial %s is missing in Optuna', r.trial_number)
FROM warmscale.runs r JOIN warmscale.studies s ON s.id = r.study_id
WHERE r.kind = 'trial' AND NOT EXISTS (
    SELECT FROM optuna.studies o JOIN optuna.trials t ON t.study_id = o.study_id
    WHERE o.study_name = s.optuna_name AND t.number = r.trial_number
)
""",
    ),
    # Numbers without gap and without repetition: 7 distinct numbers from 0 to 6 for 7 trials.
    Rule(
        invariant="trials-count-once",
        query="""
SELECT s.id, NULL,
    format('Optuna has %s trials, numbered from %s to %s',
        count(*), min(t.number), max(t.number))
FROM warmscale.studies s
JOIN optuna.studies o ON o.study_name = s.optuna_name
JOIN optuna.trials t ON t.study_id = o.study_id
GROUP BY s.id
HAVING count(DISTINCT t.number) <> count(*) OR min(t.number) <> 0 OR max(t.number) + 1 <> count(*)
""",
    ),
    # An Optuna trial without a run is in order while it waits: a user enqueued its parameters
    # (WAITING). A RUNNING one is left from an older version, and the next lease request adopts it.
    # In a completed study no request will come for either.
    Rule(
        invariant="trials-count-once",
        given=_ORPHANS,
        query="AND s.state <> 'completed' AND t.state NOT IN ('WAITING', 'RUNNING')",
    ),
    Rule(
        invariant="trials-count-once",
        given=_ORPHANS,
        query="AND s.state = 'completed'",
    ),
    # `told` is the column that says whether Optuna has the end of a run.
    Rule(
        invariant="optuna-agrees",
        given=_PAIRS,
        query="""
SELECT study_id, id, format('trial %s is %s here with loss %s, and %s in Optuna with value %s',
    trial_number, state, val_loss_nats, optuna_state, value)
FROM pairs
WHERE optuna_state <> expected AND NOT (optuna_state = 'RUNNING' AND NOT told)
   OR state = 'succeeded' AND optuna_state = 'COMPLETE' AND value IS DISTINCT FROM val_loss_nats
""",
    ),
    Rule(
        invariant="optuna-agrees",
        at_rest=True,
        given=_PAIRS,
        query="""
SELECT study_id, id,
    format('trial %s is %s here, but still %s in Optuna; the next lease request finishes it',
        trial_number, state, optuna_state)
FROM pairs WHERE expected <> 'RUNNING' AND NOT told
""",
    ),
    # Optuna stores a categorical parameter as its index: beta1 0.9 of the choices [0.8, 0.9] is 1.
    Rule(
        invariant="optuna-agrees",
        given=_PAIRS,
        query="""
SELECT pairs.study_id, pairs.id, format('trial %s: %s is %s here and %s in Optuna',
    trial_number, p.param_name, params -> p.param_name, p.param_value)
FROM pairs
JOIN optuna.trial_params p ON p.trial_id = pairs.trial_id
CROSS JOIN LATERAL (SELECT p.distribution_json::jsonb -> 'attributes' -> 'choices' AS choices) d
WHERE NOT coalesce(
    CASE WHEN d.choices IS NULL THEN (params ->> p.param_name)::float8 = p.param_value
         ELSE params -> p.param_name = d.choices -> p.param_value::int END, false)
""",
    ),
)
