"""Events as Server-Sent Events: rows of `events`, followed by their id.

A stream waits for a notification about its study or run (`service.events.wakeups`). It also polls
every 5 s, in case a notification was lost.
"""

import random
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any

from fastapi import Header, Request
from pydantic import Field
from sqlalchemy import ColumnElement, select, text, tuple_
from sqlalchemy.orm import Session
from sse_starlette.event import ServerSentEvent
from sse_starlette.sse import EventSourceResponse
from starlette.concurrency import run_in_threadpool
from starlette.types import Receive, Scope, Send

from service.access import keys
from service.access.caller import Caller
from service.access.lookup import find_run, find_study
from service.database.tables import Event, Run
from service.lifecycle import FINAL_RUN_STATES, FINAL_STUDY_STATES, LIVE_RUN_STATES
from service.observability import metrics
from service.problems import Problem, bad_field
from service.protocol import Message

_LOOK_SECONDS = 5.0  # a notice may be lost with the connection that it would have come by
_KEY_SECONDS = 30.0  # between two looks at the key: an open stream passes no door any more
_SPACING_SECONDS = 0.25  # between two looks: a busy study has many events a second
_RETRY_MILLISECONDS = 1000, 5000  # not all streams of a replica that ends come back at once
_GRACE_SECONDS = 5.0  # else the library cuts the stream off: this one ends by itself
_BATCH = 500
_LONGEST_ID = 38  # two bigints
_SETTLED = text("(pg_snapshot_xmin(pg_current_snapshot())::text)::bigint")


class EventView(Message):
    """A transition."""

    id: int
    study_id: str | None
    run_id: str | None
    type: str
    actor: str | None = Field(
        description="who did it: a key's id; `operator`, on the database itself; `service`"
    )
    attempt: int | None
    payload: dict[str, Any]
    created_at: datetime


_EVENT = {
    "type": "object",
    "required": ["id", "event", "data"],
    "properties": {
        "id": {"type": "string", "description": "to go on from, as `Last-Event-ID`"},
        "event": {"type": "string", "description": "study.created, run.leased, …"},
        "data": {
            "type": "string",
            "contentMediaType": "application/json",
            "contentSchema": EventView.model_json_schema(mode="serialization"),
        },
    },
}
# OpenAPI 3.2's word for one element of a stream, which FastAPI writes too.
ANSWER: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {"itemSchema": _EVENT}}}
}

Cursor = tuple[int, int]
LastEventId = Annotated[
    str | None,
    Header(alias="Last-Event-ID", description="go on after this event", examples=["740-17"]),
]


@dataclass(frozen=True, kw_only=True)
class Topic:
    """What is followed: an id, its filter on events, and whether nothing more will come."""

    id: str
    where: ColumnElement[bool]
    over: bool


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What came, and how it goes on: with more at once, soon without a bell, or not at all."""

    topic: str
    rows: list[tuple[Cursor, EventView]]
    over: bool
    soon: bool

    @property
    def full(self) -> bool:
        """Whether there may be more already."""
        return len(self.rows) >= _BATCH


class Streams:
    """How many streams a replica has open, and may have; a key may have a quarter of them."""

    def __init__(self, at_most: int) -> None:
        self._at_most, self._open = at_most, 0
        self._each, self._of_key = max(1, at_most // 4), Counter[str]()

    @contextmanager
    def one(self, key_id: str) -> Generator[None]:
        """A stream, open while inside. On the event loop alone.

        Raises:
            Problem: 503 when there are as many as there may be, 429 when the key has its share.
        """
        if self._open >= self._at_most:
            detail = f"this replica has {self._open} event streams open, its most; try again later"
            raise Problem(503, "too-many-streams", detail, headers={"Retry-After": "5"})
        if self._of_key[key_id] >= self._each:
            detail = f"this API key has {self._each} event streams open here, its most"
            raise Problem(429, "too-many-streams", detail, headers={"Retry-After": "5"})
        self._open += 1
        self._of_key[key_id] += 1
        metrics.streams.inc()
        try:
            yield
        finally:
            self._open -= 1
            self._of_key[key_id] -= 1
            self._of_key += Counter()  # forgets keys that have none
            metrics.streams.dec()


class _Stream(EventSourceResponse):
    """A response that counts as a stream from its first byte to its last, however it ends."""

    def __init__(
        self, follow: AsyncGenerator[ServerSentEvent], caller: Caller, streams: Streams, ping: float
    ) -> None:
        super().__init__(follow, ping=ping, shutdown_grace_period=_GRACE_SECONDS)
        self._streams, self._caller = streams, caller

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._streams.one(self._caller.key_id):
            await super().__call__(scope, receive, send)


def of_study(session: Session, caller: Caller, name_or_id: str) -> Topic:
    """Every event of a study and of its runs."""
    study = find_study(session, caller, name_or_id)
    live = select(Run.id).where(Run.study_id == study.id, Run.state.in_(LIVE_RUN_STATES)).limit(1)
    over = study.state in FINAL_STUDY_STATES and session.scalar(live) is None
    return Topic(id=study.id, where=Event.study_id == study.id, over=over)


def of_run(session: Session, caller: Caller, run_id: str) -> Topic:
    """Every event of a run."""
    run = find_run(session, caller, run_id)
    return Topic(id=run.id, where=Event.run_id == run.id, over=run.state in FINAL_RUN_STATES)


async def respond(
    request: Request, caller: Caller, topic: Callable[[Session], Topic], after: str | None
) -> EventSourceResponse:
    """Stream the topic's events after `Last-Event-ID`, to its subject's end or the key's."""
    last = _cursor(after or "0-0")
    batch = await run_in_threadpool(_read, request, topic, last)
    follow = _follow(request, caller, topic, batch, last)
    state = request.app.state
    return _Stream(follow, caller, state.streams, state.settings.event_heartbeat_seconds)


def _cursor(given: str) -> Cursor:
    xid, _, number = given.partition("-")
    if not (xid.isdecimal() and number.isdecimal() and len(given) <= _LONGEST_ID):
        raise bad_field("Last-Event-ID", given, "the id of an event of this stream, such as 740-17")
    return int(xid), int(number)


def _read(request: Request, topic: Callable[[Session], Topic], last: Cursor) -> Batch:
    """The next settled events, in the order of their transactions.

    Ids are drawn before transactions commit, so a lower one may appear after a higher one was
    read; a transaction below every running one is settled, and those are read in order.
    """
    with request.app.state.sessions() as session:
        subject = topic(session)
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
        ahead = session.scalar(
            select(Event.id).where(subject.where, Event.xid >= _SETTLED).limit(1)
        )
        over = subject.over and len(rows) < _BATCH and ahead is None
        return Batch(topic=subject.id, rows=rows, over=over, soon=ahead is not None)


def _is_good(request: Request, caller: Caller) -> bool:
    with request.app.state.sessions() as session:
        return keys.is_good(session, caller.key_id)


async def _follow(
    request: Request,
    caller: Caller,
    topic: Callable[[Session], Topic],
    batch: Batch,
    last: Cursor,
) -> AsyncGenerator[ServerSentEvent]:
    retry = random.randint(*_RETRY_MILLISECONDS)  # noqa: S311 - jitter
    yield ServerSentEvent(comment="warmscale", retry=retry)
    drain, looked_at = request.app.state.drain, time.monotonic()
    with request.app.state.wakeups.subscription(batch.topic) as bell:
        bell.notify()  # for what came since the first look
        while True:
            for last, row in batch.rows:  # noqa: PLR1704 - the stream goes on after its newest row
                yield ServerSentEvent(
                    row.model_dump_json(), event=row.type, id=f"{last[0]}-{last[1]}"
                )
            if batch.over or drain.begun:
                return
            if not batch.full:
                await drain.pause(_SPACING_SECONDS)
                # What waits for another transaction to end hears no bell of its own.
                await drain.cut_short(bell.wait(0 if batch.soon else _LOOK_SECONDS))
            if time.monotonic() - looked_at >= _KEY_SECONDS:
                if not await run_in_threadpool(_is_good, request, caller):
                    return
                looked_at = time.monotonic()
            batch = await run_in_threadpool(_read, request, topic, last)
