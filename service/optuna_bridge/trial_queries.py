"""Queries of Optuna's tables for a study's trials, each a single statement.

Optuna's own storage would read every trial of the study as an object: seconds for 10 000 trials.
"""

import json
from typing import Any

from sqlalchemy import Connection, text


def read_states(connection: Connection, study: str) -> dict[int, tuple[str, float | None]]:
    """Return Optuna's state and value of every trial of the study, by trial number."""
    rows = connection.execute(_STATES, {"study": study})
    return {row.number: (row.state, row.value) for row in rows}


def read_waiting_trials(connection: Connection, study: str) -> dict[int, dict[str, Any]]:
    """Return the given parameters of every enqueued trial that has not started, by trial number."""
    rows = connection.execute(_WAITING, {"study": study})
    return {row.number: json.loads(row.given) for row in rows}


# Optuna stores an infinite value as NULL and its sign in `value_type`.
_STATES = text("""
SELECT t.number, CAST(t.state AS text) AS state,
    CASE CAST(v.value_type AS text) WHEN 'INF_POS' THEN CAST('Infinity' AS float8)
        WHEN 'INF_NEG' THEN CAST('-Infinity' AS float8) ELSE v.value END AS value
FROM optuna.trials t JOIN optuna.studies s USING (study_id)
LEFT JOIN optuna.trial_values v ON v.trial_id = t.trial_id AND v.objective = 0
WHERE s.study_name = :study ORDER BY t.number
""")
# `Study.enqueue_trial` stores the given parameters in the attribute `fixed_params`.
_WAITING = text("""
SELECT t.number, COALESCE(a.value_json, '{}') AS given
FROM optuna.trials t JOIN optuna.studies s USING (study_id)
LEFT JOIN optuna.trial_system_attributes a ON a.trial_id = t.trial_id AND a.key = 'fixed_params'
WHERE s.study_name = :study AND t.state = 'WAITING' ORDER BY t.number
""")
