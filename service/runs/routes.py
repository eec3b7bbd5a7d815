"""`/v1/runs`: reading runs, and what their workers report."""

from typing import Annotated

from fastapi import APIRouter, Header, Query, Request
from starlette.concurrency import run_in_threadpool

from service import sse
from service.auth import Fleet, Reader
from service.bodies import Route
from service.deps import DbSession, TheSettings, UnitOfWork
from service.errors import may_answer
from service.leases.grants import artifact_uri
from service.places import check_published
from service.protocol import (
    LEASE_TOKEN_HEADER,
    CheckpointReply,
    CheckpointReport,
    FinishReply,
    FinishRequest,
    MeasurementBatch,
    ReportReply,
    RunKind,
    RunState,
    RunView,
)
from service.runs import reports, store
from service.runs.schemas import CheckpointList, MeasurementPage, RunPage
from service.studies import branches
from service.studies import store as studies
from service.tables import Run, Study

router = APIRouter(prefix="/runs", tags=["runs"], route_class=Route)
Token = Annotated[str, Header(alias=LEASE_TOKEN_HEADER)]

# What is called most comes first: routes are tried in their order.


@router.post("/{run_id}/measurements")
async def report(
    body: MeasurementBatch, caller: Fleet, run_id: str, token: Token, request: Request
) -> ReportReply:
    """Add points to the run's curve and renew its lease; an empty batch just renews it."""
    write = reports.report, request.app.state, caller, run_id, token, body.measurements
    return ReportReply(decision=await run_in_threadpool(*write))


@router.post("/{run_id}/finish")
async def finish(
    body: FinishRequest, caller: Fleet, run_id: str, token: Token, work: UnitOfWork
) -> FinishReply:
    """End this attempt. Sending the same end twice changes nothing."""
    state = await work(store.finish, caller, run_id, token, body)
    return FinishReply.model_validate({"state": state})


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
    """Runs, newest first."""
    filters = [] if study is None else [Run.study_id == studies.find(session, caller, study).id]
    filters += [] if state is None else [Run.state == state]
    filters += [] if kind is None else [Run.kind == kind]
    return store.page(session, caller, filters, cursor, limit)


@router.get("/{run_id}")
def read_run(caller: Reader, session: DbSession, run_id: str) -> RunView:
    """One run."""
    run = store.get(session, caller, run_id)
    return store.view(run, session.get_one(Study, run.study_id).name)


@router.get("/{run_id}/measurements")
def read_measurements(
    caller: Reader,
    session: DbSession,
    run_id: str,
    cursor: str | None = None,
    limit: Annotated[int, Query(ge=1, le=5000)] = 1000,
) -> MeasurementPage:
    """The run's curve, by step; nothing of it is left out."""
    run = store.get(session, caller, run_id)
    return store.measurements(session, run.id, cursor, limit)


@router.get("/{run_id}/checkpoints")
def read_checkpoints(caller: Reader, session: DbSession, run_id: str) -> CheckpointList:
    """The run's checkpoints that are kept, newest first."""
    return CheckpointList(items=store.checkpoints(session, store.get(session, caller, run_id).id))


@router.get(
    "/{run_id}/events",
    response_class=sse.EventSourceResponse,
    responses=sse.ANSWER,
)
async def stream_events(
    request: Request, caller: Reader, run_id: str, after: sse.LastEventId = None
) -> sse.EventSourceResponse:
    """The run's transitions as Server-Sent Events; `Last-Event-ID` resumes."""
    return await sse.respond(
        request, caller, lambda session: sse.of_run(session, caller, run_id), after
    )


@router.post("/{run_id}/checkpoints")
def publish(
    body: CheckpointReport,
    caller: Fleet,
    run_id: str,
    token: Token,
    session: DbSession,
    settings: TheSettings,
) -> CheckpointReply:
    """Publish a checkpoint whose files are complete and in place."""
    branches.lock_study(session, run_id, body.step)
    run = store.renew(session, caller, run_id, token, settings.lease_seconds)
    if not isinstance(run, Run):
        return CheckpointReply(decision=run)
    check_published(body.uri, artifact_uri(settings, run), run.id)
    return CheckpointReply(decision="continue", superseded=store.publish(session, run, body))
