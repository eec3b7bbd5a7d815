"""Optuna hears of a trial's end in the transaction that ends its run.

The rows are those of Optuna's own `Study.tell`, which is ten statements and a commit of its own.
A run that was cancelled, or whose lease ran out, leaves its trial untold until the next lease
request tells it, by the same statements (`leases.repair`).
"""

from typing import Literal

from sqlalchemy import text
from sqlalchemy.orm import Session

TrialEnd = Literal["COMPLETE", "PRUNED", "FAIL"]


def trial_end(state: str, *, diverged: bool) -> TrialEnd:
    """What Optuna calls the end of a run; a diverged trial is pruned at +inf, the worst there is.

    As a failure it would teach the sampler nothing.
    """
    if diverged:
        return "PRUNED"
    ends: dict[str, TrialEnd] = {"succeeded": "COMPLETE", "pruned": "PRUNED"}
    return ends.get(state, "FAIL")


def finish_trial(
    session: Session,
    optuna_name: str,
    number: int,
    end: TrialEnd,
    *,
    value: float | None,
    diverged: bool,
) -> bool:
    """End a trial, unless it has an end; False when Optuna has no such trial.

    A pruned trial's value is its last validation loss. The rows are locked as Optuna locks them.
    """
    values = {
        "study": optuna_name,
        "number": number,
        "end": end,
        "value": value if end == "COMPLETE" else None,
        "diverged": diverged,
    }
    return session.execute(_FINISH_TRIAL, values).first() is not None


_FINISH_TRIAL = text("""
WITH trial AS (
    SELECT trial_id FROM optuna.trials JOIN optuna.studies USING (study_id)
    WHERE study_name = :study AND number = :number
), ended AS (
    UPDATE optuna.trials AS t SET
        state = CAST(:end AS optuna.trialstate), datetime_complete = now() AT TIME ZONE 'UTC'
    FROM trial WHERE t.trial_id = trial.trial_id AND t.state = 'RUNNING'
    RETURNING t.trial_id
), last AS (
    SELECT point.step, point.intermediate_value AS value,
        CAST(CAST(point.intermediate_value_type AS text) AS optuna.trialvaluetype) AS value_type
    FROM optuna.trial_intermediate_values AS point JOIN ended USING (trial_id)
    WHERE point.intermediate_value_type <> 'NAN'
    ORDER BY point.step DESC LIMIT 1
), diverged AS (
    INSERT INTO optuna.trial_intermediate_values (
        trial_id, step, intermediate_value, intermediate_value_type)
    SELECT trial_id, coalesce((SELECT step FROM last), 1), NULL, 'INF_POS'
    FROM ended WHERE :diverged
    ON CONFLICT (trial_id, step) DO UPDATE SET
        intermediate_value = NULL, intermediate_value_type = 'INF_POS'
), valued AS (
    INSERT INTO optuna.trial_values (trial_id, objective, value, value_type)
    SELECT trial_id, 0, CAST(:value AS float8), CAST('FINITE' AS optuna.trialvaluetype)
    FROM ended WHERE CAST(:end AS text) = 'COMPLETE'
    UNION ALL
    SELECT trial_id, 0, NULL, 'INF_POS' FROM ended WHERE :diverged
    UNION ALL
    SELECT trial_id, 0, value, value_type FROM ended CROSS JOIN last
    WHERE CAST(:end AS text) = 'PRUNED' AND NOT :diverged
    ON CONFLICT (trial_id, objective) DO UPDATE SET
        value = excluded.value, value_type = excluded.value_type
)
SELECT FROM trial
""")
