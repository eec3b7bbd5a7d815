"""Events as Server-Sent Events: rows of `events`, followed by their id."""

from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Header, Request
from sqlalchemy import ColumnElement, select, text, tuple_
from sqlalchemy.orm import Session
from sse_starlette.event import ServerSentEvent
from sse_starlette.sse import EventSourceResponse
from starlette.concurrency import run_in_threadpool

from service.caller import Caller
from service.errors import bad_field
from service.lifecycle import FINAL_RUN_STATES, FINAL_STUDY_STATES, LIVE_RUN_STATES
from service.runs.schemas import EventView
from service.runs.store import get
from service.studies.store import find
from service.tables import Event, Run

_POLL_SECONDS = 0.5
_GRACE_SECONDS = 5.0  # else the library cuts the stream off: this one ends by itself
_BATCH = 500
_LONGEST_ID = 38  # two bigints
_SETTLED = text("(pg_snapshot_xmin(pg_current_snapshot())::text)::bigint")

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
Batch = tuple[list[tuple[Cursor, EventView]], bool]


@dataclass(frozen=True, kw_only=True)
class Topic:
    """What is followed: a filter on events, and whether nothing more will come."""

    where: ColumnElement[bool]
    over: bool


def of_study(session: Session, caller: Caller, name_or_id: str) -> Topic:
    """Every event of a study and of its runs."""
    study = find(session, caller, name_or_id)
    live = select(Run.id).where(Run.study_id == study.id, Run.state.in_(LIVE_RUN_STATES)).limit(1)
    over = study.state in FINAL_STUDY_STATES and session.scalar(live) is None
    return Topic(where=Event.study_id == study.id, over=over)


def of_run(session: Session, caller: Caller, run_id: str) -> Topic:
    """Every event of a run."""
    run = get(session, caller, run_id)
    return Topic(where=Event.run_id == run.id, over=run.state in FINAL_RUN_STATES)


async def respond(
    request: Request, topic: Callable[[Session], Topic], after: str | None
) -> EventSourceResponse:
    """Stream the topic's events after `Last-Event-ID`; the stream ends when its subject has."""
    last = _cursor(after or "0-0")
    batch = await run_in_threadpool(_read, request, topic, last)
    follow = _follow(request, topic, batch, last)
    return EventSourceResponse(follow, ping=15, shutdown_grace_period=_GRACE_SECONDS)


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
        return rows, subject.over and len(rows) < _BATCH and ahead is None


async def _follow(
    request: Request, topic: Callable[[Session], Topic], batch: Batch, last: Cursor
) -> AsyncGenerator[ServerSentEvent]:
    while True:
        rows, over = batch
        for last, row in rows:  # noqa: PLR1704 - the stream goes on after its newest row
            yield ServerSentEvent(row.model_dump_json(), event=row.type, id=f"{last[0]}-{last[1]}")
        drain = request.app.state.drain
        if over or drain.begun or await request.is_disconnected():
            return
        await drain.pause(_POLL_SECONDS)
        batch = await run_in_threadpool(_read, request, topic, last)
