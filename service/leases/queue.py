"""The lease queue: requests for leases wait in line, and each round serves all of them at once.

A round is one set of queries and one commit for as many requests as it can serve: sixteen workers
that ask at once get sixteen trials in one transaction. A request is answered as soon as its grant
has committed, because the lease runs from that moment and sampling for the others may take minutes.
Between rounds the queue waits for a notification (`service.events.wakeups`), a new request, or the
time at which a run falls due. It runs only while a request waits.
"""

import asyncio
import logging
from collections import Counter
from dataclasses import dataclass

from starlette.concurrency import iterate_in_threadpool, run_in_threadpool
from starlette.datastructures import State

from service.access.caller import Caller
from service.events.wakeups import WORK, Notification
from service.leases import rounds
from service.leases.grants import give_back
from service.leases.requests import PendingRequest
from service.observability import request_context, tracing
from service.optuna_bridge.sampler import TRANSIENT
from service.problems import Problem
from service.protocol import Lease, LeaseRequest

_log = logging.getLogger(__name__)
_LOOK_SECONDS = 5.0  # a notice may be lost with the connection that it would have come by
_MARGIN_SECONDS = 0.01  # what is due at a moment is not before it
_AT_ONCE = 256  # bids a round serves: the next round takes those behind them


@dataclass(kw_only=True)
class _Waiting:
    """A place in line."""

    bid: PendingRequest
    deadline: float
    answer: asyncio.Future[tuple[Lease, ...]]


class LeaseQueue:
    """Serves one replica's requests, on its event loop."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._line: list[_Waiting] = []
        self._of_key = Counter[str]()  # places in line
        self._bell = Notification()  # of the rounds that run, or of none
        self._rounds: asyncio.Task[None] | None = None
        self._givings: set[asyncio.Task[None]] = set()

    async def lease(self, caller: Caller, request: LeaseRequest) -> tuple[Lease, ...]:
        """Lease runs that fit; wait up to `wait_seconds` for some. Who cancels this gets none.

        Raises:
            Problem: 404 for a study that does not exist; 429 for a key with its share of the line.
        """
        self._of_key[caller.key_id] += 1
        try:
            self._check_share(caller.key_id)
            with tracing.span("lease", worker=request.worker, most=request.max_runs):
                return await self._lease(caller, request)
        finally:
            self._of_key[caller.key_id] -= 1
            self._of_key += Counter()  # forgets keys that have none

    def _check_share(self, key_id: str) -> None:
        """Nobody fills the line for the others."""
        at_most = self._state.settings.max_waiting_leases
        if self._of_key[key_id] > at_most:
            detail = f"this API key has {at_most} lease requests in line here, its most"
            raise Problem(429, "too-many-waiting", detail, headers={"Retry-After": "1"})

    async def _lease(self, caller: Caller, request: LeaseRequest) -> tuple[Lease, ...]:
        if self._state.drain.begun:
            return ()
        loop = asyncio.get_running_loop()
        place = _Waiting(
            bid=PendingRequest(caller=caller, request=request),
            deadline=loop.time() + request.wait_seconds,
            answer=loop.create_future(),
        )
        self._line.append(place)
        self._bell.notify()
        if self._rounds is None or self._rounds.done():
            self._rounds = asyncio.create_task(self._serve())
        try:
            return await place.answer
        except asyncio.CancelledError:
            place.bid.gone = True
            self._take_back(place)
            raise

    def _take_back(self, place: _Waiting) -> None:
        """Queue again what was answered in the very moment that the client left."""
        answer = place.answer
        if answer.done() and not answer.cancelled() and not answer.exception():
            self._give_back(place.bid.caller, answer.result())

    def _give_back(self, caller: Caller, leases: tuple[Lease, ...]) -> None:
        """Beside the rounds: who waits for an answer does not wait for this."""
        if leases:
            giving = asyncio.create_task(give_back_to(self._state, caller, leases))
            self._givings.add(giving)
            giving.add_done_callback(self._givings.discard)

    async def _serve(self) -> None:
        # What a round mends is no doing of the request that happened to start it.
        with (
            request_context.act_as("service"),
            self._state.wakeups.subscribe_to(WORK) as self._bell,
        ):
            while self._line:
                line = tuple(self._line)
                firsts = range(0, len(line), _AT_ONCE)
                pauses = [await self._round(line[first : first + _AT_ONCE]) for first in firsts]
                self._line = [place for place in self._line if not place.answer.done()]
                if self._line:
                    await self._pause(min(pauses))

    async def _round(self, line: tuple[_Waiting, ...]) -> float:
        """Serve these; give the seconds until the next round of them has reason to be."""
        served = [place for place in line if not place.answer.done()]
        due = 0.0 if self._state.drain.begun else await self._served(served)
        for place in served:
            self._answer(place)
        return _LOOK_SECONDS if due is None else min(due + _MARGIN_SECONDS, _LOOK_SECONDS)

    async def _served(self, places: list[_Waiting]) -> float | None:
        """Serve these together; where that fails each alone, so that one is told what one did."""
        due, bids = None, [place.bid for place in places]
        try:
            async for due in iterate_in_threadpool(rounds.serve(self._state, bids)):  # noqa: B007 - the last
                for place in places:
                    if place.bid.granted:
                        self._answer(place)
            return due  # noqa: TRY300 - what fails in the loop is what is caught
        except Exception as error:  # noqa: BLE001 - each that was not served is told
            if len(bids) == 1 or isinstance(error, TRANSIENT):
                for bid in bids:
                    bid.error = bid.error or error
                return None
        for place in places:
            await self._served([place])
        return None

    def _answer(self, place: _Waiting) -> None:
        """Answer who was granted something, or is not to wait; it is granted no more."""
        bid, answer = place.bid, place.answer
        leases, bid.granted = tuple(bid.granted), []
        if answer.done():  # it left while it was served
            self._give_back(bid.caller, leases)
        elif leases:
            answer.set_result(leases)
        elif bid.error:
            answer.set_exception(bid.error)
        elif self._state.drain.begun or asyncio.get_running_loop().time() >= place.deadline:
            answer.set_result(())
        bid.gone = answer.done()

    async def _pause(self, seconds: float) -> None:
        """Until the bell, the first deadline, the end of this process, or so many seconds."""
        now = asyncio.get_running_loop().time()
        seconds = max(0.0, min(seconds, *(place.deadline - now for place in self._line)))
        await self._state.drain.cut_short(self._bell.wait(seconds))


async def give_back_to(state: State, caller: Caller, leases: tuple[Lease, ...]) -> None:
    """Queue again what was granted to a client that is gone; at worst its leases run out."""

    def give() -> None:
        with state.sessions.begin() as session:
            give_back(session, caller, leases)

    try:
        await run_in_threadpool(give)
    except Exception:  # noqa: BLE001 - whatever it is, the line is served on
        _log.exception("%d leases of a client that is gone could not be queued again", len(leases))
