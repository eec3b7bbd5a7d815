"""`/v1/runs`: reading runs."""

from typing import Annotated

from fastapi import APIRouter, Query, Request

from service import event_stream
from service.access import lookup
from service.access.authentication import Reader
from service.database.tables import Run, Study
from service.protocol import RunKind, RunState
from service.runs import store
from service.runs.schemas import CheckpointList, MeasurementPage, RunPage, RunView
from service.web.dependencies import DbSession
from service.web.json_body import JsonRoute
from service.web.openapi import may_answer

router = APIRouter(prefix="/runs", tags=["runs"], route_class=JsonRoute)


@router.get("", responses=may_answer(404, "There is no such study."))
def list_runs(
    caller: Reader,
    session: DbSession,
    study: str | None = None,
    state: RunState | None = None,
    kind: RunKind | None = None,
    cursor: str | None = None,
    limit: Annotated[int, Query(ge=1, le=500)] = 100,
) -> RunPage:
    """List runs, newest first."""
    filters = (
        [] if study is None else [Run.study_id == lookup.find_study(session, caller, study).id]
    )
    filters += [] if state is None else [Run.state == state]
    filters += [] if kind is None else [Run.kind == kind]
    return store.list_runs(session, caller, filters, cursor, limit)


@router.get("/{run_id}")
def read_run(caller: Reader, session: DbSession, run_id: str) -> RunView:
    """Read a run."""
    run = lookup.find_run(session, caller, run_id)
    return store.view_run(run, session.get_one(Study, run.study_id).name)


@router.get("/{run_id}/measurements")
def read_measurements(
    caller: Reader,
    session: DbSession,
    run_id: str,
    cursor: str | None = None,
    limit: Annotated[int, Query(ge=1, le=5000)] = 1000,
) -> MeasurementPage:
    """Read the run's curve, ordered by step; no point is left out."""
    run = lookup.find_run(session, caller, run_id)
    return store.list_measurements(session, run.id, cursor, limit)


@router.get("/{run_id}/checkpoints")
def read_checkpoints(caller: Reader, session: DbSession, run_id: str) -> CheckpointList:
    """List the run's checkpoints that are kept, newest first."""
    return CheckpointList(
        items=store.list_checkpoints(session, lookup.find_run(session, caller, run_id).id)
    )


@router.get(
    "/{run_id}/events",
    response_class=event_stream.EventSourceResponse,
    responses=event_stream.ANSWER,
)
async def stream_events(
    request: Request, caller: Reader, run_id: str, after: event_stream.LastEventId = None
) -> event_stream.EventSourceResponse:
    """Stream the run's transitions as Server-Sent Events; `Last-Event-ID` resumes."""
    return await event_stream.stream_events(
        request, caller, lambda session: event_stream.run_topic(session, caller, run_id), after
    )
