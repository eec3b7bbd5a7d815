"""Trials as Optuna starts them, held in memory until one transaction writes them all.

Optuna asks by writing: the trial, then a commit for every parameter. `DraftStorage` shows it the
history as it was read once and keeps what it writes; Optuna's own code runs on it unchanged, so
the draws are Optuna's to the last bit. `write` puts the drafts into Optuna's tables in the caller's
transaction, beside the runs that they are for: neither is ever there without the other.
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

# TPE tells others by these what it has drawn and not yet written; here all is written at once.
_UNNEEDED = "tpe:relative_params"


@dataclass(frozen=True, kw_only=True)
class DraftTrial:
    """A trial to be started: its parameters as given out, and as Optuna's tables hold them."""

    number: int
    trial_id: int | None  # of one that was enqueued; None: it is not there yet
    params: dict[str, Any]
    rows: tuple[tuple[str, float, str], ...]  # name, value, distribution
    attributes: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class DraftBatch:
    """Drafts of one study, good only while it has as many trials as when they were drawn."""

    study_id: int
    trials_before: int
    running: tuple[int, ...]  # numbers of those that ran already
    drafts: tuple[DraftTrial, ...]
    study_attributes: dict[str, Any]


class DraftStorage:
    """What Optuna needs of a storage to start trials of one study; nothing reaches the database."""

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
        """Trials of the study, drafts included."""
        return len(self._trials)

    def collect_drafts(self) -> DraftBatch:
        """What was started here."""
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
        trial_id = -1 - number  # of no row
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
        """Start an enqueued trial, which is all that an ask does by this."""
        assert state == TrialState.RUNNING
        trial = copy.deepcopy(self._history[trial_id])
        trial.state = state
        self._start_trial(trial_id, trial)
        return True

    def _start_trial(self, trial_id: int, trial: FrozenTrial) -> None:
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
    """The study is no more as it was when the drafts were drawn."""


class WentBackError(MovedOnError):
    """It has fewer trials than it had: the database has gone back in time, so forget the study."""


def write_drafts(session: Session, drawn: DraftBatch) -> datetime:
    """Start the drafts' trials in this transaction, which has locked Optuna's study for it.

    Returns the database's time at which they were written.

    Raises:
        MovedOnError: roll back, and draw again.
        WentBackError: the same, after forgetting what is known of the study.
    """
    at = {"study": drawn.study_id, "now": datetime.now(UTC).replace(tzinfo=None)}
    popped = [d.trial_id for d in drawn.drafts if d.trial_id is not None]
    params = [(d.number, *row) for d in drawn.drafts for row in d.rows]
    rows = at | {
        "before": drawn.trials_before,
        "popped": popped,
        "new": [d.number for d in drawn.drafts if d.trial_id is None],
        **_make_columns(("number", "name", "value", "kind"), params),
    }
    started = session.execute(_START, rows).all()
    if len(started) < len(drawn.drafts):
        there = session.execute(_COUNT, {"study": drawn.study_id}).scalar_one()
        raise WentBackError if there < drawn.trials_before else MovedOnError
    ids = {row.number: row.trial_id for row in started}
    set_ = [
        (ids[d.number], k, json.dumps(v)) for d in drawn.drafts for k, v in d.attributes.items()
    ]
    if set_:
        session.execute(_SET_ATTRIBUTES, _make_columns(("trial", "name", "value"), set_))
    for name, value in drawn.study_attributes.items():
        row = {"study": drawn.study_id, "name": name, "value": json.dumps(value)}
        session.execute(_SET_STUDY_ATTRIBUTE, row)
    return started[-1].now


def _make_columns(names: Sequence[str], rows: Sequence[tuple[Any, ...]]) -> dict[str, list[Any]]:
    return {name: [row[i] for row in rows] for i, name in enumerate(names)}


_COUNT = text("SELECT count(*) FROM optuna.trials WHERE study_id = :study")
# Parameters in order: Optuna gives them in the order of their ids.
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
