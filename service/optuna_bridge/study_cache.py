"""A bounded cache of studies' trials: the least recently used study is evicted first.

A study of 10 000 trials takes about 40 MB, and twice as much if a pruner reads it. Finished studies
are no longer requested: new studies evict them.
"""

from collections import OrderedDict
from threading import Lock

from optuna.storages import BaseStorage, RDBStorage, get_storage

from service.optuna_bridge.trial_history import TrialHistory

_MAX_STUDIES = 64
_MAX_TRIALS = 100_000


class CachedStudy:
    """A study's trials in memory: our history, and Optuna's own cache."""

    def __init__(self, rdb: RDBStorage, study: str) -> None:
        self.history = TrialHistory(rdb.get_study_id_from_name(study))
        # Optuna's storage caches finished trials and never evicts any. One storage for each study:
        # the evicted study takes its storage along.
        self.storage: BaseStorage = get_storage(rdb)

    @property
    def num_trials(self) -> int:
        """The number of trials in memory."""
        return len(self.history)


class StudyCache:
    """Cached studies by name; threads may share it.

    A caller keeps a `CachedStudy` that it already has, even if the cache evicts it.
    """

    def __init__(self, rdb: RDBStorage) -> None:
        self._rdb, self._lock = rdb, Lock()
        self._studies: OrderedDict[str, CachedStudy] = OrderedDict()

    def get_study(self, study: str) -> CachedStudy:
        """Return the study's cache, empty at first, and mark the study as recently used."""
        with self._lock:
            cached = self._studies.get(study)
        # The constructor queries the database, so it runs without the lock. Two threads may both
        # make a cache; `setdefault` keeps the first.
        cached = cached or CachedStudy(self._rdb, study)
        with self._lock:
            cached = self._studies.setdefault(study, cached)
            self._studies.move_to_end(study)
            self._evict_oldest()
        return cached

    def evict_study(self, study: str) -> None:
        """Drop the study: the next use reads all its trials again."""
        with self._lock:
            self._studies.pop(study, None)

    def __len__(self) -> int:
        return len(self._studies)

    def _evict_oldest(self) -> None:
        # The study in use always stays, even if it alone exceeds the limit: without it, each
        # sampling of a study with 100 001 trials would read all trials again.
        num_trials = sum(cached.num_trials for cached in self._studies.values())
        while len(self._studies) > 1 and (
            len(self._studies) > _MAX_STUDIES or num_trials > _MAX_TRIALS
        ):
            _, oldest = self._studies.popitem(last=False)
            num_trials -= oldest.num_trials
