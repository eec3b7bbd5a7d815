"""Optuna, behind one small face; the import contracts name the few files that see it.

Optuna owns sampled parameters and trial values.
"""

import functools
import json
import logging
import math
import multiprocessing
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from threading import BoundedSemaphore, Lock
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

import optuna
import optuna_dashboard
from optuna.exceptions import StorageInternalError
from optuna.pruners import NopPruner
from optuna.samplers import RandomSampler
from optuna.storages import BaseStorage, RDBStorage
from optuna.trial import Trial
from sqlalchemy import make_url, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from service.database.engine import autocommit_engine, engine_options
from service.optuna_bridge.draft_storage import DraftBatch, DraftStorage
from service.optuna_bridge.schema import check_installed_optuna
from service.optuna_bridge.study_cache import StudyCache
from service.optuna_bridge.translation import make_pruner, make_sampler, suggest_params
from service.specs.study import StudySpec
from warmcore.specs import derive_seed

P = ParamSpec("P")
R = TypeVar("R")

# What passes by itself: the database or a helper process was away. Anything else is a fault.
TRANSIENT = (OperationalError, PoolTimeoutError, StorageInternalError, BrokenProcessPool)

_WAIT_SECONDS = 10.0
_KEY = "idempotency_key"
_log = logging.getLogger(__name__)
optuna.logging.set_verbosity(optuna.logging.WARNING)
optuna.logging.disable_default_handler()
optuna.logging.enable_propagation()
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


@dataclass(frozen=True, kw_only=True)
class Suggestion:
    """A trial that Optuna has started: its number and its parameters."""

    number: int
    params: dict[str, Any]


def _limit_calls(
    call: Callable[Concatenate["Sampler", P], R],
) -> Callable[Concatenate["Sampler", P], R]:
    """At most `pool_size` of these at once: see Sampler."""

    @functools.wraps(call)
    def bounded(self: "Sampler", *args: P.args, **kwargs: P.kwargs) -> R:
        turns = self._permits  # pyright: ignore[reportPrivateUsage]
        if not turns.acquire(timeout=_WAIT_SECONDS):
            raise PoolTimeoutError(f"no turn at Optuna within {_WAIT_SECONDS:g} s")
        try:
            return call(self, *args, **kwargs)
        finally:
            turns.release()

    return bounded


class Sampler:
    """Optuna's storage in one database. Safe to share between threads; never pickled.

    Optuna opens a second connection inside some transactions (an ask of GP, for one), so threads
    that each hold one could wait for each other's second for ever. At most `pool_size` calls
    run at once, and twice as many connections exist: each call can always have its two.
    """

    def __init__(self, url: str, *, pool_size: int = 5) -> None:
        check_installed_optuna()
        self._url = url
        pool = {"pool_size": pool_size, "max_overflow": pool_size}
        rdb = RDBStorage(
            url, engine_kwargs=pool | engine_options(make_url(url)), skip_table_creation=True
        )
        self._rdb, self.engine = rdb, rdb.engine
        self._statements = autocommit_engine(rdb.engine)
        self.storage: BaseStorage = optuna.storages.get_storage(rdb)  # of studies, not of trials
        self._permits = BoundedSemaphore(pool_size)
        self._gp_process: ProcessPoolExecutor | None = None
        self._cache = StudyCache(rdb)
        self._history_lock = Lock()  # of histories; it is one core's work in any case

    def close(self) -> None:
        """End the connections, and the helper process of GP if there is one."""
        if self._gp_process is not None:
            self._gp_process.shutdown(cancel_futures=True)
        self.engine.dispose()

    @_limit_calls
    def create_study(self, study: str) -> None:
        """Create Optuna's study of this name; that it is there already is fine."""
        handle = optuna.create_study(
            study_name=study, storage=self.storage, direction="minimize", load_if_exists=True
        )
        handle.set_metric_names(["validation loss, nats"])  # what the dashboard's axes say

    @_limit_calls
    def sample_trials(self, study: str, spec: StudySpec, count: int = 1) -> DraftBatch:
        """The next trials, not started yet: enqueued ones first, then what the sampler chooses."""
        if spec.hpo.sampler == "gp":
            return self._sample_in_gp_process(study, spec, count)
        return self.sample_trials_here(study, spec, count)

    def sample_trials_here(self, study: str, spec: StudySpec, count: int) -> DraftBatch:
        """Draw in this process, whichever the sampler is."""
        with self._history_lock:
            known = self._cache.get_study(study)
            with self._statements.connect() as connection:
                found = known.history.read_trials(connection)
            drafts = DraftStorage(self.storage, known.history.study_id, found)
            for _ in range(count):
                handle = optuna.Study(
                    study,
                    cast("BaseStorage", drafts),
                    make_sampler(spec, drafts.num_trials),
                    make_pruner(spec),
                )
                suggest_params(handle.ask(), spec)
            return drafts.collect_drafts()

    def evict_study(self, study: str) -> None:
        """Read a study anew at its next draw: the database may have gone back in time.

        So it is when a standby is promoted that lacked the last commits.
        """
        self._cache.evict_study(study)

    def _sample_in_gp_process(self, study: str, spec: StudySpec, count: int) -> DraftBatch:
        """Optuna's GP needs torch, which this process must not load: a helper process draws."""
        if self._gp_process is None:
            context = multiprocessing.get_context("spawn")
            self._gp_process = ProcessPoolExecutor(max_workers=1, mp_context=context)
        try:
            drawn = self._gp_process.submit(
                _sample_in_helper, self._url, study, spec.model_dump_json(), count
            )
            return drawn.result()
        except BrokenProcessPool:
            self._gp_process = None  # the next request starts a new one
            raise

    @_limit_calls
    def adopt_trial(self, study: str, spec: StudySpec, number: int) -> Suggestion:
        """Take over a trial that was asked for but never got its run; draw what is missing."""
        handle, trial_id = self._load_study(study), self._find_trial_id(study, number)
        handle.get_trials(deepcopy=False)  # Optuna's cache writes to no trial that it has not read
        handle.sampler = RandomSampler(seed=derive_seed(spec.hpo.seed, "adopt", number) % 2**32)
        if spec.hpo.sampler == "grid":  # its point, and no other
            handle.sampler = make_sampler(spec, number)
            handle.sampler.before_trial(handle, self.storage.get_trial(trial_id))
        trial = Trial(handle, trial_id)
        return Suggestion(number=number, params=suggest_params(trial, spec))

    @_limit_calls
    def read_waiting_trials(self, study: str) -> dict[int, dict[str, Any]]:
        """Enqueued trials that nobody started: their given parameters by number."""
        return self._read_waiting_trials(study)

    @_limit_calls
    def read_states(self, study: str) -> dict[int, tuple[str, float | None]]:
        """State and value of every trial, by number: Optuna's view."""
        with self.engine.connect() as connection:
            rows = connection.execute(text(_STATES), {"study": study})
            return {row.number: (row.state, row.value) for row in rows}

    @_limit_calls
    def enqueue_trial(self, study: str, params: dict[str, Any], key: str | None = None) -> int:
        """Put parameters at the head of what is asked next; return the trial's number.

        The key is written with the trial, in Optuna's one transaction: `enqueued` finds it again.
        """
        before = set(self._read_waiting_trials(study))
        self._load_study(study).enqueue_trial(params, user_attrs={_KEY: key} if key else None)
        return max(set(self._read_waiting_trials(study)) - before)

    @_limit_calls
    def find_enqueued_trial(self, study: str, key: str) -> tuple[int, dict[str, Any]] | None:
        """Number and given parameters of the trial that was enqueued under this key."""
        for trial in self._load_study(study).get_trials(deepcopy=False):
            if trial.user_attrs.get(_KEY) == key:
                return trial.number, dict(trial.system_attrs["fixed_params"])
        return None

    @_limit_calls
    def should_prune(self, study: str, spec: StudySpec, number: int) -> bool:
        """Whether the pruner would stop this trial by what has been heard of it."""
        handle = self._load_study(study)
        # One reading of what has changed, where a trial by its number is eight queries.
        trial = next(t for t in handle.get_trials(deepcopy=False) if t.number == number)
        return not trial.state.is_finished() and make_pruner(spec).prune(handle, trial)

    @_limit_calls
    def compute_importance(self, study: str) -> dict[str, float]:
        """Share of each parameter in the variance of the loss among the best trials (PED-ANOVA)."""
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        with self._history_lock, self.engine.connect() as connection:
            history = self._cache.get_study(study).history
            found = history.read_trials(connection)
            read = DraftStorage(self.storage, history.study_id, found)
        handle = optuna.Study(study, cast("BaseStorage", read))
        importances = optuna.importance.get_param_importances(handle, evaluator=evaluator)
        return {name: value for name, value in importances.items() if math.isfinite(value)}

    def make_dashboard(self, sees: Callable[[str], bool]) -> Callable[..., Any]:
        """Optuna's dashboard of the studies whose names it `sees`, as a WSGI application."""
        storage = optuna.storages.get_storage(self._rdb)
        every = storage.get_all_studies
        storage.get_all_studies = lambda: [s for s in every() if sees(s.study_name)]
        return optuna_dashboard.wsgi(storage)

    def find_study_name(self, optuna_id: int) -> str | None:
        """The name of the study that has this number in Optuna."""
        try:
            return self.storage.get_study_name_from_id(optuna_id)
        except KeyError:
            return None

    def _load_study(self, study: str) -> optuna.Study:
        storage = self._cache.get_study(study).storage
        return optuna.load_study(
            study_name=study, storage=storage, sampler=RandomSampler(), pruner=NopPruner()
        )

    def _read_waiting_trials(self, study: str) -> dict[int, dict[str, Any]]:
        """One statement: Optuna would read every trial of the study, seconds for ten thousand."""
        with self.engine.connect() as connection:
            rows = connection.execute(text(_WAITING), {"study": study})
            return {row.number: json.loads(row.given) for row in rows}

    def _find_trial_id(self, study: str, number: int) -> int:
        optuna_id = self.storage.get_study_id_from_name(study)
        return self.storage.get_trial_id_from_study_id_trial_number(optuna_id, number)


_STATES = """
SELECT t.number, CAST(t.state AS text) AS state,
    CASE CAST(v.value_type AS text) WHEN 'INF_POS' THEN CAST('Infinity' AS float8)
        WHEN 'INF_NEG' THEN CAST('-Infinity' AS float8) ELSE v.value END AS value
FROM optuna.trials t JOIN optuna.studies s USING (study_id)
LEFT JOIN optuna.trial_values v ON v.trial_id = t.trial_id AND v.objective = 0
WHERE s.study_name = :study ORDER BY t.number
"""
_WAITING = """
SELECT t.number, COALESCE(a.value_json, '{}') AS given
FROM optuna.trials t JOIN optuna.studies s USING (study_id)
LEFT JOIN optuna.trial_system_attributes a ON a.trial_id = t.trial_id AND a.key = 'fixed_params'
WHERE s.study_name = :study AND t.state = 'WAITING' ORDER BY t.number
"""


def _sample_in_helper(url: str, study: str, spec_json: str, count: int) -> DraftBatch:
    sampler = Sampler(url, pool_size=1)
    try:
        return sampler.sample_trials_here(study, StudySpec.model_validate_json(spec_json), count)
    finally:
        sampler.close()
