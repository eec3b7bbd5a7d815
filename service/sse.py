"""Events as Server-Sent Events: rows of `events`, followed by their id."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass

from fastapi import Request
from sqlalchemy import ColumnElement, select
from sqlalchemy.orm import Session
from sse_starlette.event import ServerSentEvent
from sse_starlette.sse import EventSourceResponse
from starlette.concurrency import run_in_threadpool

from service.errors import bad_field
from service.lifecycle import FINAL_RUN_STATES, FINAL_STUDY_STATES
from service.runs.schemas import EventView
from service.runs.store import get
from service.studies.store import find
from service.tables import Event

_POLL_SECONDS = 0.5
_BATCH = 500


@dataclass(frozen=True, kw_only=True)
class Topic:
    """What is followed: a filter on events, and whether nothing more will come."""

    where: ColumnElement[bool]
    over: bool


def of_study(session: Session, name_or_id: str) -> Topic:
    """Every event of a study and of its runs."""
    study = find(session, name_or_id)
    return Topic(where=Event.study_id == study.id, over=study.state in FINAL_STUDY_STATES)


def of_run(session: Session, run_id: str) -> Topic:
    """Every event of a run."""
    run = get(session, run_id)
    return Topic(where=Event.run_id == run.id, over=run.state in FINAL_RUN_STATES)


async def respond(request: Request, topic: Callable[[Session], Topic]) -> EventSourceResponse:
    """Stream the topic's events after `Last-Event-ID`; the stream ends when its subject has."""
    last = _last_event_id(request)
    batch = await run_in_threadpool(_read, request, topic, last)
    return EventSourceResponse(_follow(request, topic, batch, last), ping=15)


def _last_event_id(request: Request) -> int:
    given = request.headers.get("Last-Event-ID", "0")
    if not given.isdecimal():
        raise bad_field("Last-Event-ID", given, "the number of an event, such as 17")
    return min(int(given), 2**63 - 1)


def _read(
    request: Request, topic: Callable[[Session], Topic], last: int
) -> tuple[list[EventView], bool]:
    with request.app.state.sessions() as session:
        subject = topic(session)
        query = select(Event).where(subject.where, Event.id > last).order_by(Event.id).limit(_BATCH)
        fields = tuple(EventView.model_fields)
        rows = [EventView(**{f: getattr(e, f) for f in fields}) for e in session.scalars(query)]
        return rows, subject.over and len(rows) < _BATCH


async def _follow(
    request: Request,
    topic: Callable[[Session], Topic],
    batch: tuple[list[EventView], bool],
    last: int,
) -> AsyncGenerator[ServerSentEvent]:
    while True:
        rows, over = batch
        for row in rows:
            last = row.id
            yield ServerSentEvent(row.model_dump_json(), event=row.type, id=str(row.id))
        if over or request.app.state.stopping.is_set() or await request.is_disconnected():
            return
        await asyncio.sleep(_POLL_SECONDS)
        batch = await run_in_threadpool(_read, request, topic, last)
