"""Trials: each counted once, and Optuna's view of them ours.

Optuna is written in transactions of its own, before ours where a trial starts and after ours where
it ends. So a trial may run without a run yet, and may not have been told of its end yet; the next
lease request mends both.
"""

from service.operations.invariants.rules import Rule

_PAIRS = """
WITH pairs AS (
    SELECT r.*, t.trial_id, t.state::text AS heard, v.value,
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
SELECT s.id, NULL, format('Optuna holds trial %s as %s; it has no run', t.number, t.state)
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
SELECT s.id, NULL, format('%s trials of a budget of %s', count(*), s.spec -> 'hpo' ->> 'trials')
FROM warmscale.studies s JOIN warmscale.runs r ON r.study_id = s.id AND r.kind = 'trial'
GROUP BY s.id HAVING count(*) > (s.spec -> 'hpo' ->> 'trials')::bigint
""",
    ),
    Rule(
        invariant="trials-count-once",
        query="""
SELECT s.id, NULL,
    format('completed with %s of its %s trials at an end',
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
SELECT r.study_id, r.id, format('trial %s, of which Optuna knows nothing', r.trial_number)
FROM warmscale.runs r JOIN warmscale.studies s ON s.id = r.study_id
WHERE r.kind = 'trial' AND NOT EXISTS (
    SELECT FROM optuna.studies o JOIN optuna.trials t ON t.study_id = o.study_id
    WHERE o.study_name = s.optuna_name AND t.number = r.trial_number
)
""",
    ),
    Rule(
        invariant="trials-count-once",
        query="""
SELECT s.id, NULL,
    format('Optuna''s %s trials have the numbers %s to %s', count(*), min(t.number), max(t.number))
FROM warmscale.studies s
JOIN optuna.studies o ON o.study_name = s.optuna_name
JOIN optuna.trials t ON t.study_id = o.study_id
GROUP BY s.id
HAVING count(DISTINCT t.number) <> count(*) OR min(t.number) <> 0 OR max(t.number) + 1 <> count(*)
""",
    ),
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
    Rule(
        invariant="optuna-agrees",
        given=_PAIRS,
        query="""
SELECT study_id, id, format('trial %s is %s here with loss %s and %s in Optuna with value %s',
    trial_number, state, val_loss_nats, heard, value)
FROM pairs
WHERE heard <> expected AND NOT (heard = 'RUNNING' AND NOT told)
   OR state = 'succeeded' AND heard = 'COMPLETE' AND value IS DISTINCT FROM val_loss_nats
""",
    ),
    Rule(
        invariant="optuna-agrees",
        at_rest=True,
        given=_PAIRS,
        query="""
SELECT study_id, id,
    format('trial %s is %s here and %s in Optuna, which is still to be told',
        trial_number, state, heard)
FROM pairs WHERE expected <> 'RUNNING' AND NOT told
""",
    ),
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
