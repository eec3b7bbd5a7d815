"""Events as Server-Sent Events: rows of `events`, followed by their id.

A stream waits for a notification about its study or run (`service.events.wakeups`). It also polls
every 5 s, in case a notification was lost.
"""

import random
import time
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any

from fastapi import Header, Request
from pydantic import Field
from sqlalchemy import ColumnElement, select, text, tuple_
from sqlalchemy.orm import Session, sessionmaker
from sse_starlette.event import ServerSentEvent
from sse_starlette.sse import EventSourceResponse
from starlette.concurrency import run_in_threadpool
from starlette.types import Receive, Scope, Send

from service.access import keys
from service.access.caller import Caller
from service.access.concurrency_limits import ConcurrencyLimit
from service.access.lookup import find_run, find_study
from service.database.tables import Event, Run
from service.events.wakeups import Wakeups
from service.lifecycle import FINAL_RUN_STATES, FINAL_STUDY_STATES, LIVE_RUN_STATES
from service.observability import metrics
from service.problems import Problem, bad_field
from service.protocol import Message
from service.settings import Settings
from service.web.services import Database, find_service
from service.web.shutdown import Shutdown

_POLL_SECONDS = 5.0  # a notification can be lost while the listener reconnects
_KEY_CHECK_SECONDS = 30.0  # the key was checked when the stream opened; it may be revoked since
_SPACING_SECONDS = 0.25  # between two reads: a busy study has many events a second
_RETRY_MILLISECONDS = 1000, 5000  # spread: the streams of a replica that exits reconnect apart
_GRACE_SECONDS = 5.0  # longer than a stream needs to end by itself; then the library cuts it off
_BATCH = 500
_LONGEST_ID = 38  # two bigints
# The oldest transaction that is still running: each transaction below it has ended.
_SETTLED = text("(pg_snapshot_xmin(pg_current_snapshot())::text)::bigint")


class EventView(Message):
    """A transition."""

    id: int
    study_id: str | None
    run_id: str | None
    type: str
    actor: str | None = Field(
        description="the key's id; `operator` for a command on the database; or `service`"
    )
    attempt: int | None
    payload: dict[str, Any]
    created_at: datetime


_EVENT = {
    "type": "object",
    "required": ["id", "event", "data"],
    "properties": {
        "id": {"type": "string", "description": "send it as `Last-Event-ID` to continue after it"},
        "event": {"type": "string", "description": "study.created, run.leased, …"},
        "data": {
            "type": "string",
            "contentMediaType": "application/json",
            "contentSchema": EventView.model_json_schema(mode="serialization"),
        },
    },
}
# `itemSchema` is OpenAPI 3.2's keyword for an element of a stream; FastAPI writes it too.
ANSWER: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {"itemSchema": _EVENT}}}
}

Cursor = tuple[int, int]  # transaction id, event id
LastEventId = Annotated[
    str | None,
    Header(
        alias="Last-Event-ID", description="continue after the event with this id",
        examples=["740-17"],
    ),
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Topic:
    """The study or run that a stream follows; `is_over`: it will have no further events."""

    id: str
    where: ColumnElement[bool]
    is_over: bool


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The events of a read, in order; `has_unsettled`: more wait for a transaction to end."""

    topic: str
    rows: list[tuple[Cursor, EventView]]
    is_over: bool
    has_unsettled: bool

    @property
    def is_full(self) -> bool:
        """True if the read stopped at its limit: more events may be there already."""
        return len(self.rows) >= _BATCH


class Streams:
    """The open streams of a replica: at most `at_most`, and at most a quarter of them per key."""

    def __init__(self, at_most: int) -> None:
        self._at_most = at_most
        self._limit = ConcurrencyLimit(
            max(1, at_most // 4),
            kind="too-many-streams",
            noun="event streams open",
            retry_after_seconds=5,
        )

    @contextmanager
    def open_stream(self, key_id: str) -> Generator[None]:
        """Count a stream of this key while the block runs. On the event loop's thread only.

        Raises:
            Problem: 503 when the replica has its most, 429 when the key has its share.
        """
        num_open = self._limit.num_calls
        if num_open >= self._at_most:
            detail = f"this replica has {num_open} event streams open, its most; try again later"
            raise Problem(503, "too-many-streams", detail, headers={"Retry-After": "5"})
        with self._limit.hold_place(key_id):
            metrics.streams.inc()
            try:
                yield
            finally:
                metrics.streams.dec()


class _Stream(EventSourceResponse):
    """A response that counts as a stream from its first byte to its last, however it ends."""

    def __init__(
        self, events: AsyncGenerator[ServerSentEvent], caller: Caller, streams: Streams, ping: float
    ) -> None:
        super().__init__(events, ping=ping, shutdown_grace_period=_GRACE_SECONDS)
        self._streams, self._caller = streams, caller

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._streams.open_stream(self._caller.key_id):
            await super().__call__(scope, receive, send)


def study_topic(session: Session, caller: Caller, name_or_id: str) -> Topic:
    """Return the topic of every event of a study and of its runs."""
    study = find_study(session, caller, name_or_id)
    live = select(Run.id).where(Run.study_id == study.id, Run.state.in_(LIVE_RUN_STATES)).limit(1)
    is_over = study.state in FINAL_STUDY_STATES and session.scalar(live) is None
    return Topic(id=study.id, where=Event.study_id == study.id, is_over=is_over)


def run_topic(session: Session, caller: Caller, run_id: str) -> Topic:
    """Return the topic of every event of a run."""
    run = find_run(session, caller, run_id)
    return Topic(id=run.id, where=Event.run_id == run.id, is_over=run.state in FINAL_RUN_STATES)


async def stream_events(
    request: Request, caller: Caller, topic: Callable[[Session], Topic], after: str | None
) -> EventSourceResponse:
    """Stream the events after `Last-Event-ID`, until the topic is over or the key is revoked."""
    follower = _Follower(
        sessions=find_service(request.app, Database).sessions,
        wakeups=find_service(request.app, Wakeups),
        shutdown=find_service(request.app, Shutdown),
        caller=caller,
        topic=topic,
    )
    last = _parse_cursor(after or "0-0")
    # Read before the response begins: an unknown study is still answered with a 404.
    events = follower.follow(await follower.read_batch(last), last)
    ping = find_service(request.app, Settings).event_heartbeat_seconds
    return _Stream(events, caller, find_service(request.app, Streams), ping)


def _parse_cursor(given: str) -> Cursor:
    xid, _, number = given.partition("-")
    if not (xid.isdecimal() and number.isdecimal() and len(given) <= _LONGEST_ID):
        raise bad_field("Last-Event-ID", given, "the id of an event of this stream, such as 740-17")
    return int(xid), int(number)


def _read_batch(
    sessions: sessionmaker[Session], topic: Callable[[Session], Topic], last: Cursor
) -> Batch:
    """Return the next events of ended transactions, ordered by transaction, then by id.

    PostgreSQL assigns an event's id before its transaction commits. Event 17 can therefore become
    visible after event 18 was read, and a reader that goes by ids alone would skip it. Transactions
    below the oldest running transaction add no more events: only theirs are read.
    """
    with sessions() as session:
        subject = topic(session)
        # A committed event is unsettled while an older transaction runs. Ask for those first: if
        # the older transaction ends between the two statements, the second returns the event. In
        # the other order neither would report it, and the stream would sleep or end without it.
        unsettled = session.scalar(
            select(Event.id).where(subject.where, Event.xid >= _SETTLED).limit(1)
        )
        query = (
            select(Event)
            .where(subject.where, tuple_(Event.xid, Event.id) > last, Event.xid < _SETTLED)
            .order_by(Event.xid, Event.id)
            .limit(_BATCH)
        )
        fields = tuple(EventView.model_fields)
        rows = [
            ((event.xid, event.id), EventView(**{f: getattr(event, f) for f in fields}))
            for event in session.scalars(query)
        ]
        is_over = subject.is_over and len(rows) < _BATCH and unsettled is None
        return Batch(
            topic=subject.id, rows=rows, is_over=is_over, has_unsettled=unsettled is not None
        )


@dataclass(frozen=True, kw_only=True)
class _Follower:
    """The reads of a stream: its caller, its topic, and the services that it waits on."""

    sessions: sessionmaker[Session]
    wakeups: Wakeups
    shutdown: Shutdown
    caller: Caller
    topic: Callable[[Session], Topic]

    async def read_batch(self, last: Cursor) -> Batch:
        """Read the events after `last` in a thread: the query would block the event loop."""
        return await run_in_threadpool(_read_batch, self.sessions, self.topic, last)

    async def follow(self, batch: Batch, last: Cursor) -> AsyncGenerator[ServerSentEvent]:
        """Yield the events of `batch`, then each later event as it commits."""
        retry = random.randint(*_RETRY_MILLISECONDS)  # noqa: S311 - jitter
        yield ServerSentEvent(comment="warmscale", retry=retry)
        checked_at = time.monotonic()
        with self.wakeups.subscribe_to(batch.topic) as notification:
            # An event may have been written between the first read and the subscription.
            notification.notify()
            while True:
                for last, row in batch.rows:  # noqa: PLR1704 - the next read continues after it
                    id_ = f"{last[0]}-{last[1]}"
                    yield ServerSentEvent(row.model_dump_json(), event=row.type, id=id_)
                if batch.is_over or self.shutdown.begun:
                    return
                if not batch.is_full:
                    await self.shutdown.pause(_SPACING_SECONDS)
                    # No notification tells that another transaction has ended: poll for that.
                    seconds = 0 if batch.has_unsettled else _POLL_SECONDS
                    await self.shutdown.cut_short(notification.wait(seconds))
                if time.monotonic() - checked_at >= _KEY_CHECK_SECONDS:
                    if not await run_in_threadpool(self._is_key_good):
                        return
                    checked_at = time.monotonic()
                batch = await self.read_batch(last)

    def _is_key_good(self) -> bool:
        with self.sessions() as session:
            return keys.is_key_good(session, self.caller.key_id)
