"""Measurements on their way to the service, off the training thread.

One thread sends what has gathered: about once a second, at once when an evaluation is among it
(the pruner waits for those), and an empty batch when silence would cost the lease. While the
service is away the client keeps trying and measurements gather here; training goes on.
"""

import collections
import threading
import time
from types import TracebackType
from typing import Self

from service.client import Client
from service.protocol import Decision, Lease, Measurement, MeasurementBatch

_MAX_BATCH = 1000  # the protocol's
_LEAVE_SECONDS = 5.0


class CancelledError(Exception):
    """The run was cancelled while its attempt waited."""


class Reporter:
    """Reports one lease's measurements; a context manager that owns the sending thread."""

    def __init__(self, client: Client, lease: Lease, *, period_seconds: float = 1.0) -> None:
        self._client = client
        self._lease = lease
        self._period_seconds = period_seconds
        self._queue: collections.deque[Measurement] = collections.deque()
        self._changed = threading.Condition()
        self._num_added = self._num_accepted = 0
        self._hurry = self._closed = False
        self._error: Exception | None = None
        self._decision: Decision = "continue"
        self._thread = threading.Thread(target=self._run, name="reporter", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        # It may be waiting out an outage; it holds nothing that the process needs.
        self._thread.join(_LEAVE_SECONDS)

    def add(self, measurement: Measurement) -> None:
        """Take a measurement; never waits for the network."""
        with self._changed:
            self._queue.append(measurement)
            self._num_added += 1
            if measurement.evaluation is not None:
                self._hurry = True
                self._changed.notify_all()

    def check(self) -> Decision:
        """Return what the service last wants; lock-free.

        Raises:
            StaleLeaseError: another attempt holds the run.
            Exception: whatever else ended the sending, such as an outage beyond all patience.
        """
        if self._error is not None:
            raise self._error
        return self._decision

    def end_if_cancelled(self) -> None:
        """Raise `CancelledError` if the service cancelled the run; raises as `check` does."""
        if self.check() == "cancel":
            raise CancelledError

    def flush(self) -> Decision:
        """Block until everything added so far is accepted; raises as `check` does."""
        with self._changed:
            wanted = self._num_added
            self._hurry = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._num_accepted >= wanted or self._error)
        return self.check()

    def _run(self) -> None:
        try:
            while (batch := self._next_batch()) is not None:
                self._send(batch)
        except Exception as error:  # noqa: BLE001 - raised again on the training thread
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _next_batch(self) -> MeasurementBatch | None:
        """Wait until something is due; None once closed."""
        started = time.monotonic()
        silence = self._lease.lease_seconds / 3
        with self._changed:
            while not self._closed:
                waited = time.monotonic() - started
                limit = min(self._period_seconds, silence) if self._queue else silence
                if waited >= limit or (self._hurry and self._queue):
                    return self._take()
                self._hurry = False
                self._changed.wait(min(limit - waited, self._period_seconds))
        return None

    def _take(self) -> MeasurementBatch:
        count = min(len(self._queue), _MAX_BATCH)
        taken = tuple(self._queue.popleft() for _ in range(count))
        self._hurry = self._hurry and bool(self._queue)
        return MeasurementBatch(measurements=taken)

    def _send(self, batch: MeasurementBatch) -> None:
        reply = self._client.report(self._lease, batch)
        with self._changed:
            self._num_accepted += len(batch.measurements)
            if self._decision == "continue":  # an end once decided stands
                self._decision = reply.decision
            self._changed.notify_all()
