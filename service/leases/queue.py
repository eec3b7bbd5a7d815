"""The lease queue: requests for leases wait here, and each round serves all of them at once.

A round is a set of queries and a commit for all requests that it can serve: sixteen workers that
ask at once get sixteen trials in the same transaction. A request is answered as soon as its grant
has committed, because the lease runs from that moment and sampling for the others may take minutes.
Between rounds the queue waits for a notification (`service.events.wakeups`), a new request, or the
time at which a run falls due. It runs only while a request waits.
"""

import asyncio
import logging
from collections.abc import Generator, Iterable
from dataclasses import dataclass

from starlette.concurrency import run_in_threadpool

from service.access.caller import Caller
from service.access.concurrency_limits import ConcurrencyLimit
from service.events.wakeups import WORK, Notification, Wakeups
from service.leases import rounds
from service.leases.attempts import release_leases
from service.leases.requests import Granted, PendingRequest, RoundEnd
from service.leases.services import LeaseServices
from service.observability import request_context, tracing
from service.optuna_bridge.sampler import TRANSIENT
from service.protocol import Lease, LeaseRequest
from service.web.shutdown import Shutdown

_log = logging.getLogger(__name__)
_POLL_SECONDS = 5.0  # a notification can be lost while the listener reconnects
_MARGIN_SECONDS = 0.01  # wake slightly after the due time: a timer that fires early finds nothing
_CLOSE_SECONDS = 2.0  # uvicorn may have taken 10 s already; the supervisor kills after 15 s
_MAX_PER_ROUND = 256  # the next round takes the requests behind them


@dataclass(kw_only=True)
class _Waiting:
    """A request that waits in the queue, and the future that answers it."""

    pending: PendingRequest
    deadline: float
    answer: asyncio.Future[tuple[Lease, ...]]


class LeaseQueue:
    """The requests of a replica. Its methods run on the event loop, its rounds in threads."""

    # Example: workers a, b and c ask within a millisecond; a study has room for two trials.
    #   a  enters the queue and starts `_run_rounds`; its round takes a alone and samples for a
    #   b  and c enter while that round runs
    #   a  is answered when its grant has committed
    #   b  and c share the next round: b is granted the second trial and answered
    #   c  stays; the queue waits for a notification, for c's deadline or for 5 s
    # A client that disconnects cancels its `lease_runs`. Runs that it was granted in that moment
    # are queued again.

    def __init__(self, services: LeaseServices, wakeups: Wakeups, shutdown: Shutdown) -> None:
        self._services, self._wakeups, self._shutdown = services, wakeups, shutdown
        self._waiting: list[_Waiting] = []
        self._limit = ConcurrencyLimit(
            services.settings.max_waiting_leases,
            kind="too-many-waiting",
            noun="lease requests waiting",
            retry_after_seconds=1,
        )
        self._notification = Notification()  # of the rounds that run; replaced when they start
        # asyncio refers to tasks weakly: without these references a garbage collection could
        # destroy one that is pending.
        self._rounds: asyncio.Task[None] | None = None
        self._releases: set[asyncio.Task[None]] = set()

    async def lease_runs(self, caller: Caller, request: LeaseRequest) -> tuple[Lease, ...]:
        """Lease runs that fit; wait up to `wait_seconds` for the first. Cancelling leases none.

        Raises:
            Problem: 404 for a study that does not exist; 429 if the key has its share waiting.
        """
        with (
            self._limit.hold_place(caller.key_id),
            tracing.span("lease", worker=request.worker, most=request.max_runs),
        ):
            return await self._wait_for_answer(caller, request)

    async def _wait_for_answer(self, caller: Caller, request: LeaseRequest) -> tuple[Lease, ...]:
        if self._shutdown.begun:
            return ()
        loop = asyncio.get_running_loop()
        entry = _Waiting(
            pending=PendingRequest(caller=caller, request=request),
            deadline=loop.time() + request.wait_seconds,
            answer=loop.create_future(),
        )
        self._waiting.append(entry)
        self._notification.notify()
        if self._rounds is None or self._rounds.done():
            self._rounds = asyncio.create_task(self._run_rounds())
        try:
            return await entry.answer
        except asyncio.CancelledError:
            entry.pending.is_closed = True
            self._release_unreceived(entry)
            raise

    def _release_unreceived(self, entry: _Waiting) -> None:
        """Queue again the runs of an answer that was given as its client left."""
        answer = entry.answer
        if answer.done() and not answer.cancelled() and not answer.exception():
            self._start_release(entry.pending.caller, answer.result())

    def _start_release(self, caller: Caller, leases: tuple[Lease, ...]) -> None:
        """Queue runs again in a task of its own: no request that waits is delayed by it."""
        if leases:
            task = asyncio.create_task(self.release_runs(caller, leases))
            self._releases.add(task)
            task.add_done_callback(self._releases.discard)

    async def release_runs(self, caller: Caller, leases: tuple[Lease, ...]) -> None:
        """Queue again the runs granted to a client that has left; an error is logged.

        After an error the leases expire, and that queues the runs as well.
        """

        def release() -> None:
            with self._services.sessions.begin() as session:
                release_leases(session, caller, leases)

        try:
            await run_in_threadpool(release)
        except Exception:  # noqa: BLE001 - the queue must go on
            _log.exception("%d leases of a client that left are not queued again", len(leases))

    async def close(self) -> None:
        """Wait for runs that are being queued again: an expired lease counts as a failure."""
        if self._releases:
            await asyncio.wait(self._releases, timeout=_CLOSE_SECONDS)

    async def _run_rounds(self) -> None:
        """Run rounds until no request waits."""
        # Repairs are logged as done by `service`, not by the caller whose request started this
        # round.
        with (
            request_context.act_as("service"),
            self._wakeups.subscribe_to(WORK) as self._notification,
        ):
            try:
                while self._waiting:
                    await self._serve_all()
            except Exception as error:  # noqa: BLE001 - nothing else looks at this task's error
                _log.exception("the rounds of leases failed")
                self._fail_all(error)

    async def _serve_all(self) -> None:
        """Serve all waiting requests, then wait until one of them has reason for a new round."""
        entries = tuple(self._waiting)
        firsts = range(0, len(entries), _MAX_PER_ROUND)
        pauses = [await self._run_round(entries[n : n + _MAX_PER_ROUND]) for n in firsts]
        self._waiting = [entry for entry in self._waiting if not entry.answer.done()]
        if self._waiting:
            await self._pause(min(pauses))

    def _fail_all(self, error: Exception) -> None:
        """Answer all waiting requests with the error; the next request starts new rounds."""
        entries, self._waiting = self._waiting, []
        for entry in entries:
            if not entry.answer.done():
                entry.pending.is_closed = True
                entry.answer.set_exception(error)

    async def _run_round(self, entries: tuple[_Waiting, ...]) -> float:
        """Serve these requests; return the seconds until they have a reason for another round."""
        open_entries = [entry for entry in entries if not entry.answer.done()]
        if not self._shutdown.begun:
            end = await self._serve_together(open_entries)
            due_seconds = end.due_seconds
        else:
            due_seconds = 0.0
        for entry in open_entries:
            self._answer_if_ready(entry)
        if due_seconds is None:
            return _POLL_SECONDS
        return min(due_seconds + _MARGIN_SECONDS, _POLL_SECONDS)

    async def _serve_together(self, entries: list[_Waiting]) -> RoundEnd:
        """Serve these requests in a round; if it fails, serve each alone to find the fault.

        An outage fails all of them: a round for each would only repeat it.
        """
        requests = [entry.pending for entry in entries]
        try:
            steps = rounds.serve_round(self._services, requests)
            while isinstance(step := await run_in_threadpool(_run_to_next_step, steps), Granted):
                self._answer_granted(entries)
            return step  # noqa: TRY300 - the handler below is for errors of a step
        except Exception as error:  # noqa: BLE001 - each request that was not served gets it
            if len(requests) == 1 or isinstance(error, TRANSIENT):
                for pending in requests:
                    pending.error = pending.error or error
                return RoundEnd(due_seconds=None)
        for entry in entries:
            await self._serve_together([entry])
        return RoundEnd(due_seconds=None)

    def _answer_granted(self, entries: Iterable[_Waiting]) -> None:
        for entry in entries:
            if entry.pending.granted:
                self._answer_if_ready(entry)

    def _answer_if_ready(self, entry: _Waiting) -> None:
        """Answer a request with its leases or its error, or with none at its deadline."""
        pending, answer = entry.pending, entry.answer
        leases, pending.granted = tuple(pending.granted), []
        if answer.done():  # the client left while the round ran
            self._start_release(pending.caller, leases)
        elif leases:
            answer.set_result(leases)
        elif pending.error:
            answer.set_exception(pending.error)
        elif self._shutdown.begun or asyncio.get_running_loop().time() >= entry.deadline:
            answer.set_result(())
        pending.is_closed = answer.done()

    async def _pause(self, seconds: float) -> None:
        """Wait for a notification, the first deadline, the shutdown, or `seconds` to pass."""
        now = asyncio.get_running_loop().time()
        seconds = max(0.0, min(seconds, *(entry.deadline - now for entry in self._waiting)))
        await self._shutdown.cut_short(self._notification.wait(seconds))


def _run_to_next_step(steps: Generator[Granted, None, RoundEnd]) -> Granted | RoundEnd:
    """Run a round until it has granted runs, or to its end; called in a thread."""
    try:
        return next(steps)
    except StopIteration as end:
        return end.value
