"""A cache of callers for a few seconds: a fleet sends the same key with every report.

Looking up a key takes a transaction, which was half of a report's time. Each process can therefore
accept a revoked or expired key for up to `KEPT_SECONDS`.
"""

import time
from collections.abc import Callable

from service.access.caller import Caller

KEPT_SECONDS = 3.0
_MAX_KEPT = 1024


class CallerCache:
    """Callers with keys that were valid at their last look-up, for the event loop's thread only."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._callers: dict[str, tuple[float, Caller]] = {}

    def get_caller(self, key_hash: str) -> Caller | None:
        """Return the caller if its key was looked up within `KEPT_SECONDS`."""
        found_at, caller = self._callers.get(key_hash, (-KEPT_SECONDS, None))
        return caller if self.read_clock() - found_at < KEPT_SECONDS else None

    def keep_caller(self, key_hash: str, caller: Caller, found_at: float) -> None:
        """Keep the result of a look-up that began at `found_at`."""
        # A deployment has a few keys; more than this many are an accident, not worth an LRU.
        if len(self._callers) >= _MAX_KEPT:
            self._callers.clear()
        self._callers[key_hash] = found_at, caller

    def read_clock(self) -> float:
        """Return the time by this cache's clock."""
        return self._clock()
