"""What this process knows of studies: the least recently used are forgotten first.

A study of 10 000 trials is about 40 MB here, and as much again where a pruner reads it. A study
that has ended is asked for no more, so it goes as others come.
"""

from collections import OrderedDict
from threading import Lock

from optuna.storages import BaseStorage, RDBStorage, get_storage

from service.optuna_bridge.trial_history import TrialHistory

_MAX_STUDIES = 64
_MAX_TRIALS = 100_000


class CachedStudy:
    """Of one study: its trials, and Optuna's cache of them."""

    def __init__(self, rdb: RDBStorage, study: str) -> None:
        self.history = TrialHistory(rdb.get_study_id_from_name(study))
        self.storage: BaseStorage = get_storage(rdb)  # caches finished trials, for ever

    @property
    def num_trials(self) -> int:
        """How many are held in memory."""
        return len(self.history)


class StudyCache:
    """By name. Safe to share between threads; who uses one keeps it though it is forgotten."""

    def __init__(self, rdb: RDBStorage) -> None:
        self._rdb, self._lock = rdb, Lock()
        self._studies: OrderedDict[str, CachedStudy] = OrderedDict()

    def get_study(self, study: str) -> CachedStudy:
        """What is known of this study; at first nothing."""
        with self._lock:
            known = self._studies.get(study)
        known = known or CachedStudy(self._rdb, study)  # asks the database: not under the lock
        with self._lock:
            known = self._studies.setdefault(study, known)
            self._studies.move_to_end(study)
            self._evict_oldest()
        return known

    def evict_study(self, study: str) -> None:
        """Know nothing of this study."""
        with self._lock:
            self._studies.pop(study, None)

    def __len__(self) -> int:
        return len(self._studies)

    def _evict_oldest(self) -> None:
        """The newest always stays, however large it is."""
        num_trials = sum(known.num_trials for known in self._studies.values())
        while len(self._studies) > 1 and (
            len(self._studies) > _MAX_STUDIES or num_trials > _MAX_TRIALS
        ):
            _, oldest = self._studies.popitem(last=False)
            num_trials -= oldest.num_trials
