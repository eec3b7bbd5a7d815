"""The callers of the last seconds: a fleet shows the same key with every report.

Looking a key up takes a transaction, which was half of a report's time. A key that is revoked or
runs out can go on reporting for `KEPT_SECONDS`, in each process.
"""

import time
from collections.abc import Callable

from service.access.caller import Caller

KEPT_SECONDS = 3.0
_MOST_KEPT = 1024


class CallerCache:
    """Holders of keys that were good when they were last looked up. For one event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._found: dict[str, tuple[float, Caller]] = {}

    def get(self, key_hash: str) -> Caller | None:
        """The caller, if its key was looked up in the last seconds."""
        found_at, caller = self._found.get(key_hash, (-KEPT_SECONDS, None))
        return caller if self.now() - found_at < KEPT_SECONDS else None

    def keep(self, key_hash: str, caller: Caller, found_at: float) -> None:
        """Keep what a look-up that began at `found_at` gave."""
        if len(self._found) >= _MOST_KEPT:
            self._found.clear()
        self._found[key_hash] = found_at, caller

    def now(self) -> float:
        """The time by the clock that these are kept by."""
        return self._clock()
