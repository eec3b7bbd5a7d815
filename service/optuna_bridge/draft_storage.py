"""Draft trials: Optuna starts them in memory, and a single transaction writes them.

Optuna's ask writes to its storage: the trial, then a commit for every parameter. `DraftStorage`
is a storage in memory: Optuna reads the trial history from it, and it keeps Optuna's writes. Since
Optuna's own code runs unchanged, the samples equal Optuna's to the last bit. `write_drafts` writes
the drafts to Optuna's tables in the transaction that writes their runs: no trial is without a run.
"""

import copy
import json
from collections.abc import Container, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from optuna.distributions import BaseDistribution, distribution_to_json
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import text
from sqlalchemy.orm import Session

# TPE writes its samples to these attributes before it writes the parameters, for samplers that run
# at the same time. A draft writes all its parameters at once, so the attributes have no use.
_UNNEEDED = "tpe:relative_params"


@dataclass(frozen=True, kw_only=True)
class DraftTrial:
    """A sampled trial that has not started: its parameters, and their rows for Optuna's tables."""

    number: int
    trial_id: int | None  # of an enqueued trial; None for a trial without a row yet
    params: dict[str, Any]
    rows: tuple[tuple[str, float, str], ...]  # name, value, distribution
    attributes: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class DraftBatch:
    """Drafts of a study, valid while the study has as many trials as at the sampling."""

    study_id: int
    trials_before: int
    running: tuple[int, ...]  # numbers of the trials that ran before the sampling
    drafts: tuple[DraftTrial, ...]
    study_attributes: dict[str, Any]


class DraftStorage:
    """The part of Optuna's storage interface that an ask calls; it never writes to the database."""

    # Example: a study has trials 0 to 8, and a round samples two trials. The first ask calls
    # `create_new_trial`, which appends trial 9 with the id -10, and `set_trial_param` for each
    # parameter. The second ask gets all ten trials from `get_all_trials`: TPE counts trial 9 as
    # running and chooses other parameters. Then `write_drafts` gives both trials real ids.

    def __init__(
        self, backend: BaseStorage, study_id: int, history: dict[int, FrozenTrial]
    ) -> None:
        self._backend = backend
        self._study_id = study_id
        self._history = history
        self._trials = list(history.values())
        self._trials_before = len(self._trials)
        self._running = tuple(t.number for t in self._trials if t.state == TrialState.RUNNING)
        self._started: dict[int, FrozenTrial] = {}
        self._study_attributes: dict[str, Any] = {}

    @property
    def num_trials(self) -> int:
        """The number of trials of the study, drafts included."""
        return len(self._trials)

    def collect_drafts(self) -> DraftBatch:
        """Return the trials that Optuna has started on this storage."""
        return DraftBatch(
            study_id=self._study_id,
            trials_before=self._trials_before,
            running=self._running,
            drafts=tuple(_make_draft(*started) for started in self._started.items()),
            study_attributes=self._study_attributes,
        )

    def get_study_id_from_name(self, _: str) -> int:
        return self._study_id

    def get_study_directions(self, study_id: int) -> list[StudyDirection]:
        return self._backend.get_study_directions(study_id)

    def get_study_system_attrs(self, study_id: int) -> dict[str, Any]:
        return self._backend.get_study_system_attrs(study_id) | self._study_attributes

    def set_study_system_attr(self, _: int, key: str, value: Any) -> None:
        self._study_attributes[key] = value

    def create_new_trial(self, _: int) -> int:
        number = self.num_trials
        trial_id = -1 - number  # negative: no row has this id
        trial = FrozenTrial(
            number=number,
            trial_id=trial_id,
            state=TrialState.RUNNING,
            value=None,
            datetime_start=None,
            datetime_complete=None,
            params={},
            distributions={},
            user_attrs={},
            system_attrs={},
            intermediate_values={},
        )
        self._start_trial(trial_id, trial)
        return trial_id

    def set_trial_state_values(self, trial_id: int, state: TrialState) -> bool:
        """Start an enqueued trial; an ask calls this method for nothing more."""
        assert state == TrialState.RUNNING
        trial = copy.deepcopy(self._history[trial_id])
        trial.state = state
        self._start_trial(trial_id, trial)
        return True

    def _start_trial(self, trial_id: int, trial: FrozenTrial) -> None:
        # A new trial's number is the list's length: then the slice is empty, and this appends.
        self._trials[trial.number : trial.number + 1] = [trial]
        self._started[trial_id] = trial

    def get_trial(self, trial_id: int) -> FrozenTrial:
        return copy.deepcopy(self._started[trial_id])

    def get_trial_system_attrs(self, trial_id: int) -> dict[str, Any]:
        return self.get_trial(trial_id).system_attrs

    def get_all_trials(
        self,
        _: int,
        deepcopy: bool = True,  # noqa: FBT001, FBT002 - Optuna's signature
        states: Container[TrialState] | None = None,
    ) -> list[FrozenTrial]:
        trials = [t for t in self._trials if states is None or t.state in states]
        return copy.deepcopy(trials) if deepcopy else trials

    def set_trial_param(
        self, trial_id: int, name: str, value: float, distribution: BaseDistribution
    ) -> None:
        trial = self._started[trial_id]
        trial.distributions[name] = distribution
        trial.params[name] = distribution.to_external_repr(value)

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        self._started[trial_id].system_attrs[key] = value


def _make_draft(trial_id: int, trial: FrozenTrial) -> DraftTrial:
    kinds = trial.distributions
    return DraftTrial(
        number=trial.number,
        trial_id=trial_id if trial_id >= 0 else None,
        params=trial.params,
        rows=tuple(
            (name, float(kinds[name].to_internal_repr(value)), distribution_to_json(kinds[name]))
            for name, value in trial.params.items()
        ),
        attributes={k: v for k, v in trial.system_attrs.items() if not k.startswith(_UNNEEDED)},
    )


class MovedOnError(Exception):
    """A study that has changed since the drafts were sampled."""


class WentBackError(MovedOnError):
    """A study that has lost trials, because the database lost commits: evict it from the cache."""


def write_drafts(session: Session, batch: DraftBatch) -> datetime:
    """Start the batch's trials in this transaction; the caller has locked Optuna's study.

    Returns the database's time at the write.

    Raises:
        MovedOnError: the study has changed; roll back and sample again.
        WentBackError: the study has lost trials; evict it from the cache, then do the same.
    """
    popped = [draft.trial_id for draft in batch.drafts if draft.trial_id is not None]
    params = [(draft.number, *row) for draft in batch.drafts for row in draft.rows]
    rows = {
        "study": batch.study_id,
        "now": datetime.now(UTC).replace(tzinfo=None),
        "before": batch.trials_before,
        "popped": popped,
        "new": [draft.number for draft in batch.drafts if draft.trial_id is None],
        **_make_columns(("number", "name", "value", "kind"), params),
    }
    started = session.execute(_START, rows).all()
    if len(started) < len(batch.drafts):
        num_trials = session.execute(_COUNT, {"study": batch.study_id}).scalar_one()
        raise WentBackError if num_trials < batch.trials_before else MovedOnError
    _write_attributes(session, batch, {row.number: row.trial_id for row in started})
    return started[-1].now


def _write_attributes(session: Session, batch: DraftBatch, ids: dict[int, int]) -> None:
    attributes = [
        (ids[draft.number], name, json.dumps(value))
        for draft in batch.drafts
        for name, value in draft.attributes.items()
    ]
    if attributes:
        session.execute(_SET_ATTRIBUTES, _make_columns(("trial", "name", "value"), attributes))
    for name, value in batch.study_attributes.items():
        row = {"study": batch.study_id, "name": name, "value": json.dumps(value)}
        session.execute(_SET_STUDY_ATTRIBUTE, row)


def _make_columns(names: Sequence[str], rows: Sequence[tuple[Any, ...]]) -> dict[str, list[Any]]:
    return {name: [row[i] for row in rows] for i, name in enumerate(names)}


_COUNT = text("SELECT count(*) FROM optuna.trials WHERE study_id = :study")
# `same` guards both writes: if another transaction has started a trial since the sampling, the
# statement starts none, and the caller sees too few rows. `popped` starts enqueued trials, `new`
# inserts trials. Parameters are inserted in the spec's order, because Optuna returns them by id.
_START = text("""
WITH same AS (
  SELECT (SELECT count(*) FROM optuna.trials WHERE study_id = :study) = :before AS same
), popped AS (
  UPDATE optuna.trials SET state = 'RUNNING', datetime_start = :now
  WHERE trial_id = ANY(CAST(:popped AS integer[])) AND (SELECT same FROM same)
    AND state = 'WAITING'
  RETURNING number, trial_id
), new AS (
  INSERT INTO optuna.trials (study_id, number, state, datetime_start)
  SELECT :study, number, CAST('RUNNING' AS optuna.trialstate), :now
  FROM unnest(CAST(:new AS integer[])) AS number WHERE (SELECT same FROM same) ORDER BY number
  RETURNING number, trial_id
), started AS (
  SELECT * FROM popped UNION ALL SELECT * FROM new
), written AS (
  INSERT INTO optuna.trial_params (trial_id, param_name, param_value, distribution_json)
  SELECT trial_id, name, value, kind
  FROM unnest(CAST(:number AS integer[]), CAST(:name AS text[]), CAST(:value AS float8[]),
              CAST(:kind AS text[])) WITH ORDINALITY AS p (number, name, value, kind, place)
  JOIN started USING (number) ORDER BY place
)
SELECT number, trial_id, clock_timestamp() AS now FROM started
""")
_SET_ATTRIBUTES = text("""
INSERT INTO optuna.trial_system_attributes (trial_id, key, value_json)
SELECT * FROM unnest(CAST(:trial AS integer[]), CAST(:name AS text[]), CAST(:value AS text[]))
ON CONFLICT (trial_id, key) DO UPDATE SET value_json = excluded.value_json
""")
_SET_STUDY_ATTRIBUTE = text("""
INSERT INTO optuna.study_system_attributes (study_id, key, value_json)
VALUES (:study, :name, :value)
ON CONFLICT (study_id, key) DO UPDATE SET value_json = excluded.value_json
""")
