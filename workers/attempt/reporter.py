"""The queue of measurements for the service, sent by a thread of its own.

The thread sends a batch about once a second. It sends at once when the queue holds an evaluation,
because the pruner waits for evaluations. It sends an empty batch when the lease would otherwise
expire. While the service is away, the client retries, the queue grows, and training goes on.
"""

import collections
import threading
import time
from types import TracebackType
from typing import Self

from service.client import Client
from service.protocol import Decision, Lease, Measurement, MeasurementBatch

_MAX_BATCH = 1000  # limit of the protocol
_LEAVE_SECONDS = 5.0


class CancelledError(Exception):
    """The run was cancelled while its attempt waited."""


class Reporter:
    """Sender of the measurements of a lease; a context manager that owns the sending thread."""

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
        self._thread = threading.Thread(target=self._send_all, name="reporter", daemon=True)

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
        # The thread may be waiting for the service. It is a daemon and may be left behind.
        self._thread.join(_LEAVE_SECONDS)

    def add_measurement(self, measurement: Measurement) -> None:
        """Queue a measurement, without waiting for the network."""
        with self._changed:
            self._queue.append(measurement)
            self._num_added += 1
            if measurement.evaluation is not None:
                self._hurry = True
                self._changed.notify_all()

    def check_decision(self) -> Decision:
        """Return the service's last decision, without taking a lock.

        Raises:
            StaleLeaseError: another attempt holds the run.
            Exception: another error that ended the sending, for example a too long outage.
        """
        if self._error is not None:
            raise self._error
        return self._decision

    def end_if_cancelled(self) -> None:
        """Raise `CancelledError` after a cancellation; raise as `check_decision` does."""
        if self.check_decision() == "cancel":
            raise CancelledError

    def flush(self) -> Decision:
        """Wait until the service has accepted the queue; raise as `check_decision` does."""
        with self._changed:
            wanted = self._num_added
            self._hurry = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._num_accepted >= wanted or self._error)
        return self.check_decision()

    def _send_all(self) -> None:
        try:
            while (batch := self._next_batch()) is not None:
                self._send_batch(batch)
        except Exception as error:  # noqa: BLE001 - raised again on the training thread
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _next_batch(self) -> MeasurementBatch | None:
        """Wait until a batch is due and return it; None after the close."""
        # With a lease of 60 s and a period of 1 s: a measurement goes out at the latest 1 s after
        # the batch before; an evaluation and a `flush` at once (`_hurry`); without measurements an
        # empty batch renews the lease every 20 s, so that two renewals may be lost.
        started = time.monotonic()
        silence = self._lease.lease_seconds / 3
        with self._changed:
            while not self._closed:
                waited = time.monotonic() - started
                limit = min(self._period_seconds, silence) if self._queue else silence
                if waited >= limit or (self._hurry and self._queue):
                    return self._take_batch()
                self._hurry = False
                self._changed.wait(min(limit - waited, self._period_seconds))
        return None

    def _take_batch(self) -> MeasurementBatch:
        count = min(len(self._queue), _MAX_BATCH)
        taken = tuple(self._queue.popleft() for _ in range(count))
        self._hurry = self._hurry and bool(self._queue)
        return MeasurementBatch(measurements=taken)

    def _send_batch(self, batch: MeasurementBatch) -> None:
        reply = self._client.report(self._lease, batch)
        with self._changed:
            self._num_accepted += len(batch.measurements)
            if self._decision == "continue":  # a decision to end the run is final
                self._decision = reply.decision
            self._changed.notify_all()
