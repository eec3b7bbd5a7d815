"""The Optuna version that warmscale works with, and the error for any other version.

`draft_storage.py`, `finish_trial.py`, `trial_history.py` and `trial_queries.py` use SQL on Optuna's
tables. In other tables that SQL could damage a study. Therefore `schema.py` compares the installed
Optuna's migrations and columns with the constants below, before any write. This module must not
import Optuna: the command line imports the error, and Optuna takes a second to import.
"""

from importlib.metadata import version

KNOWN_VERSIONS = "5.0.*"
# The newest of Optuna's own Alembic migrations. Its name is older than Optuna 5, because the tables
# have not changed since Optuna 3.2.
KNOWN_REVISION = "v3.2.0.a"
KNOWN_COLUMNS: dict[str, frozenset[str]] = {
    "studies": frozenset({"study_id", "study_name"}),
    "study_system_attributes": frozenset(
        {"study_system_attribute_id", "study_id", "key", "value_json"}
    ),
    "trials": frozenset(
        {"trial_id", "number", "study_id", "state", "datetime_start", "datetime_complete"}
    ),
    "trial_params": frozenset(
        {"param_id", "trial_id", "param_name", "param_value", "distribution_json"}
    ),
    "trial_values": frozenset({"trial_value_id", "trial_id", "objective", "value", "value_type"}),
    "trial_intermediate_values": frozenset(
        {
            "trial_intermediate_value_id",
            "trial_id",
            "step",
            "intermediate_value",
            "intermediate_value_type",
        }
    ),
    "trial_system_attributes": frozenset(
        {"trial_system_attribute_id", "trial_id", "key", "value_json"}
    ),
    "trial_user_attributes": frozenset(
        {"trial_user_attribute_id", "trial_id", "key", "value_json"}
    ),
}


class UnknownOptunaError(Exception):
    """An installed Optuna whose tables this version of warmscale does not know."""

    def __init__(self, found: str) -> None:
        super().__init__(
            f"Optuna {version('optuna')} is installed, and {found}. This version of warmscale "
            f"writes to Optuna's tables as Optuna {KNOWN_VERSIONS} makes them (revision "
            f"{KNOWN_REVISION}), so it stops before it writes. Nothing was changed. "
            f"Run: pip install 'optuna=={KNOWN_VERSIONS}'"
        )
