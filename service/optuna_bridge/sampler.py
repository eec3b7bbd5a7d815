"""The service's interface to Optuna: the other packages do not import Optuna.

Optuna's tables hold the sampled parameters and the values of trials.
"""

import functools
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
from sqlalchemy import make_url
from sqlalchemy.exc import OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from service.database.engine import autocommit_engine, engine_options
from service.optuna_bridge import trial_queries
from service.optuna_bridge.draft_storage import DraftBatch, DraftStorage
from service.optuna_bridge.schema import check_installed_optuna
from service.optuna_bridge.study_cache import StudyCache
from service.optuna_bridge.translation import make_pruner, make_sampler, suggest_params
from service.specs.study import StudySpec
from warmcore.specs import derive_seed

P = ParamSpec("P")
R = TypeVar("R")

# Errors that pass by themselves: the database or a helper process was away. The caller retries
# after these; any other error is a fault of the study or of the code.
TRANSIENT = (OperationalError, PoolTimeoutError, StorageInternalError, BrokenProcessPool)

_WAIT_SECONDS = 10.0
_KEY_ATTRIBUTE = "idempotency_key"
_log = logging.getLogger(__name__)
# Optuna logs to stderr by default. Send its warnings to the service's own log instead.
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
    """Let at most `pool_size` decorated calls run at once; the reason is in `Sampler`."""

    @functools.wraps(call)
    def bounded(self: "Sampler", *args: P.args, **kwargs: P.kwargs) -> R:
        permits = self._permits  # pyright: ignore[reportPrivateUsage]
        if not permits.acquire(timeout=_WAIT_SECONDS):
            raise PoolTimeoutError(f"no call to Optuna could start within {_WAIT_SECONDS:g} s")
        try:
            return call(self, *args, **kwargs)
        finally:
            permits.release()

    return bounded


class Sampler:
    """Optuna's storage in a database; threads may share it, and it must never be pickled."""

    # Optuna opens a second connection inside some transactions, for example in an ask of GP.
    # Example: with 5 connections and 5 threads, each thread holds a connection and waits for a
    # second, for ever. Therefore at most `pool_size` calls run at once, on twice the connections.

    def __init__(self, url: str, *, pool_size: int = 5) -> None:
        check_installed_optuna()
        self._url = url
        pool = {"pool_size": pool_size, "max_overflow": pool_size}
        rdb = RDBStorage(
            url, engine_kwargs=pool | engine_options(make_url(url)), skip_table_creation=True
        )
        self._rdb, self.engine = rdb, rdb.engine
        self._statements = autocommit_engine(rdb.engine)
        # For studies alone: trials are read through the study cache, which is bounded.
        self.storage: BaseStorage = optuna.storages.get_storage(rdb)
        self._permits = BoundedSemaphore(pool_size)
        self._gp_process: ProcessPoolExecutor | None = None
        self._cache = StudyCache(rdb)
        # Histories serve one thread at a time. The lock costs little: sampling is CPU work in
        # Python, and a second thread would wait for the interpreter anyway.
        self._history_lock = Lock()

    def close(self) -> None:
        """Close the connections, and end GP's helper process if it runs."""
        if self._gp_process is not None:
            self._gp_process.shutdown(cancel_futures=True)
        self.engine.dispose()

    @_limit_calls
    def create_study(self, study: str) -> None:
        """Create Optuna's study of this name, unless it exists."""
        handle = optuna.create_study(
            study_name=study, storage=self.storage, direction="minimize", load_if_exists=True
        )
        handle.set_metric_names(["validation loss, nats"])  # the dashboard labels its axes with it

    @_limit_calls
    def sample_trials(self, study: str, spec: StudySpec, count: int = 1) -> DraftBatch:
        """Sample `count` trials as drafts: enqueued trials first, then the sampler's choices.

        The database does not change: `write_drafts` starts the trials.
        """
        if spec.hpo.sampler == "gp":
            return self._sample_in_gp_process(study, spec, count)
        return self.sample_trials_here(study, spec, count)

    def sample_trials_here(self, study: str, spec: StudySpec, count: int) -> DraftBatch:
        """Sample in this process, with any sampler; GP loads torch."""
        with self._history_lock:
            history = self._cache.get_study(study).history
            with self._statements.connect() as connection:
                trials = history.read_trials(connection)
            drafts = DraftStorage(self.storage, history.study_id, trials)
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
        """Drop the study from the cache: the next sampling reads all its trials again.

        Call it when the database may have lost commits: a standby that lacked them was promoted.
        """
        self._cache.evict_study(study)

    def _sample_in_gp_process(self, study: str, spec: StudySpec, count: int) -> DraftBatch:
        # Optuna's GP imports torch, and this process must never load torch: it must stay small and
        # start fast. The helper imports torch at its first use (about 3 s) and then stays alive.
        if self._gp_process is None:
            context = multiprocessing.get_context("spawn")
            self._gp_process = ProcessPoolExecutor(max_workers=1, mp_context=context)
        try:
            sampled = self._gp_process.submit(
                _sample_in_helper, self._url, study, spec.model_dump_json(), count
            )
            return sampled.result()
        except BrokenProcessPool:
            self._gp_process = None  # the next request starts a new process
            raise

    @_limit_calls
    def adopt_trial(self, study: str, spec: StudySpec, number: int) -> Suggestion:
        """Sample the missing parameters of a trial that runs in Optuna but has no run here."""
        handle, trial_id = self._load_study(study), self._find_trial_id(study, number)
        handle.get_trials(deepcopy=False)  # Optuna's cache writes only to trials that it has read
        handle.sampler = RandomSampler(seed=derive_seed(spec.hpo.seed, "adopt", number) % 2**32)
        if spec.hpo.sampler == "grid":  # a random point could repeat another trial's grid point
            handle.sampler = make_sampler(spec, number)
            handle.sampler.before_trial(handle, self.storage.get_trial(trial_id))
        trial = Trial(handle, trial_id)
        return Suggestion(number=number, params=suggest_params(trial, spec))

    @_limit_calls
    def read_waiting_trials(self, study: str) -> dict[int, dict[str, Any]]:
        """Return the given parameters of the enqueued trials that have not started, by number."""
        return self._read_waiting_trials(study)

    @_limit_calls
    def read_states(self, study: str) -> dict[int, tuple[str, float | None]]:
        """Return Optuna's state and value of every trial, by number."""
        with self.engine.connect() as connection:
            return trial_queries.read_states(connection, study)

    @_limit_calls
    def enqueue_trial(self, study: str, params: dict[str, Any], key: str | None = None) -> int:
        """Enqueue a trial with these parameters, and return its number.

        Optuna writes the idempotency key in the transaction that writes the trial, and
        `find_enqueued_trial` finds the trial by the key.
        """
        before = set(self._read_waiting_trials(study))
        attributes = {_KEY_ATTRIBUTE: key} if key else None
        self._load_study(study).enqueue_trial(params, user_attrs=attributes)
        return max(set(self._read_waiting_trials(study)) - before)

    @_limit_calls
    def find_enqueued_trial(self, study: str, key: str) -> tuple[int, dict[str, Any]] | None:
        """Return the number and the given parameters of the trial enqueued under this key."""
        for trial in self._load_study(study).get_trials(deepcopy=False):
            if trial.user_attrs.get(_KEY_ATTRIBUTE) == key:
                return trial.number, dict(trial.system_attrs["fixed_params"])
        return None

    @_limit_calls
    def should_prune(self, study: str, spec: StudySpec, number: int) -> bool:
        """Return True if the pruner would stop this trial, given the losses reported so far."""
        handle = self._load_study(study)
        # A single query for the changed trials; Optuna needs eight to read a trial by its number.
        trial = next(t for t in handle.get_trials(deepcopy=False) if t.number == number)
        return not trial.state.is_finished() and make_pruner(spec).prune(handle, trial)

    @_limit_calls
    def compute_importance(self, study: str) -> dict[str, float]:
        """Return each parameter's share of the loss variance among the best trials (PED-ANOVA)."""
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        with self._history_lock, self.engine.connect() as connection:
            history = self._cache.get_study(study).history
            trials = history.read_trials(connection)
            drafts = DraftStorage(self.storage, history.study_id, trials)
        handle = optuna.Study(study, cast("BaseStorage", drafts))
        importances = optuna.importance.get_param_importances(handle, evaluator=evaluator)
        return {name: value for name, value in importances.items() if math.isfinite(value)}

    def make_dashboard(self, can_see: Callable[[str], bool]) -> Callable[..., Any]:
        """Return a WSGI application: Optuna's dashboard of the studies that `can_see` accepts."""
        storage = optuna.storages.get_storage(self._rdb)
        list_all = storage.get_all_studies
        storage.get_all_studies = lambda: [s for s in list_all() if can_see(s.study_name)]
        return optuna_dashboard.wsgi(storage)

    def find_study_name(self, optuna_id: int) -> str | None:
        """Return the name of the study with this id in Optuna, or None."""
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
        with self.engine.connect() as connection:
            return trial_queries.read_waiting_trials(connection, study)

    def _find_trial_id(self, study: str, number: int) -> int:
        optuna_id = self.storage.get_study_id_from_name(study)
        return self.storage.get_trial_id_from_study_id_trial_number(optuna_id, number)


def _sample_in_helper(url: str, study: str, spec_json: str, count: int) -> DraftBatch:
    # This function runs in the helper process, which has no connection of its parent.
    sampler = Sampler(url, pool_size=1)
    try:
        return sampler.sample_trials_here(study, StudySpec.model_validate_json(spec_json), count)
    finally:
        sampler.close()
