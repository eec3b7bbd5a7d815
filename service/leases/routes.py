"""`POST /v1/leases`: workers get runs here and nowhere else."""

import asyncio

from fastapi import APIRouter, Request

from service.access.authentication import Fleet
from service.access.caller import Caller
from service.leases.queue import LeaseQueue
from service.protocol import Lease, LeaseReply, LeaseRequest
from service.web.json_body import JsonRoute
from service.web.openapi import may_answer
from service.web.services import find_service

router = APIRouter(tags=["leases"], route_class=JsonRoute)


@router.post("/leases", responses=may_answer(404, "There is no such study."))
async def lease(body: LeaseRequest, caller: Fleet, request: Request) -> LeaseReply:
    """Lease runs that fit; wait up to `wait_seconds` for some, holding no connection."""
    return LeaseReply(leases=await _lease_unless_disconnected(body, caller, request))


async def _lease_unless_disconnected(
    body: LeaseRequest, caller: Caller, request: Request
) -> tuple[Lease, ...]:
    """Return what the queue grants; queue it again if the client disconnects first."""
    queue = find_service(request.app, LeaseQueue)
    leasing = asyncio.create_task(queue.lease_runs(caller, body))
    disconnect = asyncio.create_task(_wait_for_disconnect(request))
    try:
        await asyncio.wait({leasing, disconnect}, return_when=asyncio.FIRST_COMPLETED)
        if not disconnect.done():
            return leasing.result()
        if leasing.done():
            await queue.release_runs(caller, leasing.result())
        return ()
    finally:
        leasing.cancel()
        disconnect.cancel()
        # Wait until both have ended: asyncio refers to tasks weakly, and logs an error that
        # nobody has looked at.
        await asyncio.gather(leasing, disconnect, return_exceptions=True)


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
