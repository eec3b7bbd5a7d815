"""Presence: whether this process could be reached by its workers."""

import threading
import time


class Presence:
    """Tells an absence of this process from an absence of a worker.

    While this process or its database was away, no worker could renew its lease. After an absence
    longer than a lease, live leases are therefore extended and not expired.

    A process knows its own absences alone. A replica that received no request because the other
    replicas did extends leases too. Therefore a lease is extended once until its worker reports
    again (`runs.graced`): a dead worker's lease ends within twice its length, however many
    replicas run and however seldom each is asked.
    """

    def __init__(self, lease_seconds: float) -> None:
        self.lease_seconds = lease_seconds
        self._lock = threading.Lock()
        self._last_request: float | None = None
        self._must_extend = False

    def note_request(self) -> bool:
        """Note that a request is being served; return False while leases must be extended first.

        The first request after an absence may be a worker's report, which extends its own lease
        alone. The process therefore remembers the absence until `note_extended`.
        """
        # Example with leases of 30 s: a laptop sleeps from 12:00 to 12:05. The report at 12:05:01
        # returns False, and the round at 12:05:02 does too: it extends the other workers' leases
        # to 12:05:32. Without the memory that round would expire them.
        now = time.clock_gettime(time.CLOCK_BOOTTIME)  # goes on while a laptop sleeps
        with self._lock:
            before, self._last_request = self._last_request, now
            if before is None or now - before > self.lease_seconds:
                self._must_extend = True
            return not self._must_extend

    def note_extended(self) -> None:
        """Note that live leases have been extended."""
        with self._lock:
            self._must_extend = False
