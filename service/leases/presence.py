"""Whether this process was reachable for its workers."""

import threading
import time


class Presence:
    """Whether this process and its database have been there for the workers.

    While they were away no worker could renew its lease. After an absence longer than a lease,
    live leases are given their time again instead of being taken back: the absence was ours.

    Every replica knows only of its own absences: one that was merely asked nothing for a while,
    because others were, gives time too. So a lease is given time once, until its worker reports
    again (`runs.graced`): the lease of a dead worker ends within twice its length, however many
    replicas there are and however seldom each is asked.
    """

    def __init__(self, lease_seconds: float) -> None:
        self.lease_seconds = lease_seconds
        self._lock = threading.Lock()
        self._last: float | None = None
        self._owes = False

    def note_request(self) -> bool:
        """Note that a request was served just now; False while an absence is not made good.

        The first request after an absence may be a worker's report, which makes nothing good.
        """
        now = time.clock_gettime(time.CLOCK_BOOTTIME)  # goes on while a laptop sleeps
        with self._lock:
            before, self._last = self._last, now
            if before is None or now - before > self.lease_seconds:
                self._owes = True
            return not self._owes

    def note_extended(self) -> None:
        """Note that live leases have been given their time again."""
        with self._lock:
            self._owes = False
