"""`POST /v1/runs/{id}/measurements · /checkpoints · /finish`: writes under a lease."""

from typing import Annotated

from fastapi import APIRouter, Depends, Header, Request
from starlette.concurrency import run_in_threadpool

from service.access.authentication import Fleet
from service.leases import attempts, checkpoints, reports
from service.leases.services import LeaseServices
from service.protocol import (
    LEASE_TOKEN_HEADER,
    CheckpointReply,
    CheckpointReport,
    FinishReply,
    FinishRequest,
    MeasurementBatch,
    ReportReply,
)
from service.web.dependencies import DbSession, TheSettings, UnitOfWork
from service.web.json_body import JsonRoute
from service.web.services import find_service


# A plain function would cost a change of thread in every report.
async def _services(request: Request) -> LeaseServices:
    return find_service(request.app, LeaseServices)


router = APIRouter(prefix="/runs", tags=["runs"], route_class=JsonRoute)
Token = Annotated[str, Header(alias=LEASE_TOKEN_HEADER)]
TheServices = Annotated[LeaseServices, Depends(_services)]


@router.post("/{run_id}/measurements")
async def report(
    body: MeasurementBatch, caller: Fleet, run_id: str, token: Token, services: TheServices
) -> ReportReply:
    """Add points to the run's curve and renew its lease; an empty batch just renews it."""
    write = reports.take_report, services, caller, run_id, token, body.measurements
    return ReportReply(decision=await run_in_threadpool(*write))


@router.post("/{run_id}/finish")
async def finish(
    body: FinishRequest, caller: Fleet, run_id: str, token: Token, work: UnitOfWork
) -> FinishReply:
    """End this attempt. Sending the same end twice changes nothing."""
    state = await work(attempts.finish_attempt, caller, run_id, token, body)
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
    return checkpoints.publish_checkpoint(session, caller, run_id, token, body, settings=settings)
