"""`POST /v1/runs/{id}/measurements · /checkpoints · /finish`: writes under a lease."""

from typing import Annotated

from fastapi import APIRouter, Header, Request
from starlette.concurrency import run_in_threadpool

from service.access.authentication import Fleet
from service.access.paths import check_published
from service.database.tables import Run
from service.leases import attempts, reports
from service.leases.grants import artifact_uri
from service.protocol import (
    LEASE_TOKEN_HEADER,
    CheckpointReply,
    CheckpointReport,
    FinishReply,
    FinishRequest,
    MeasurementBatch,
    ReportReply,
)
from service.studies import branches
from service.web.dependencies import DbSession, TheSettings, UnitOfWork
from service.web.json_body import JsonRoute

router = APIRouter(prefix="/runs", tags=["runs"], route_class=JsonRoute)
Token = Annotated[str, Header(alias=LEASE_TOKEN_HEADER)]


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
    state = await work(attempts.finish, caller, run_id, token, body)
    return FinishReply.model_validate({"state": state})


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
    run = attempts.renew(session, caller, run_id, token, settings.lease_seconds)
    if not isinstance(run, Run):
        return CheckpointReply(decision=run)
    check_published(body.uri, artifact_uri(settings, run), run.id)
    return CheckpointReply(decision="continue", superseded=attempts.publish(session, run, body))
