"""The end of a trial, written to Optuna's tables in the transaction that ends its run.

The statement writes the rows that Optuna's `Study.tell` writes. `tell` needs ten statements and a
separate commit. If a run is cancelled or its lease expires, its trial keeps running in Optuna until
the next lease request finishes it with the same statement (`leases.repair`).
"""

from typing import Literal

from sqlalchemy import text
from sqlalchemy.orm import Session

TrialEnd = Literal["COMPLETE", "PRUNED", "FAIL"]


def trial_end(state: str, *, diverged: bool) -> TrialEnd:
    """Return Optuna's name for the end of a run in the state `state`.

    A diverged trial counts as pruned with the loss +inf. A failure would not keep samplers from the
    same region, because they ignore failed trials.
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
    """Finish a running trial with its value; a finished trial stays as it is.

    Returns False if Optuna has no trial with this number. The value of a pruned trial is its last
    validation loss. The statement locks the rows that Optuna would lock.
    """
    values = {
        "study": optuna_name,
        "number": number,
        "end": end,
        "value": value if end == "COMPLETE" else None,
        "diverged": diverged,
    }
    return session.execute(_FINISH_TRIAL, values).first() is not None


# `ended` changes the trial only if it runs, and every INSERT reads `ended`: for a finished trial
# the statement writes nothing. `last` is the newest evaluation with a number. Example: trial 7
# reported 3.0 at step 1 and 0.5 at step 2. If pruned, it gets the value 0.5. If diverged, step 2
# and the value become +inf. If complete, it gets the final loss :value. The last SELECT returns a
# row if trial 7 exists.
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
