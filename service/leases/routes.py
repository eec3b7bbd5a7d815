"""`POST /v1/leases`: the one way work leaves the service."""

import asyncio

from fastapi import APIRouter, Request

from service.access.authentication import Fleet
from service.access.caller import Caller
from service.leases.queue import give_back_to
from service.protocol import Lease, LeaseReply, LeaseRequest
from service.web.json_body import JsonRoute
from service.web.openapi import may_answer

router = APIRouter(tags=["leases"], route_class=JsonRoute)


@router.post("/leases", responses=may_answer(404, "There is no such study."))
async def lease(body: LeaseRequest, caller: Fleet, request: Request) -> LeaseReply:
    """Lease runs that fit; wait up to `wait_seconds` for some, holding no connection."""
    return LeaseReply(leases=await _unless_gone(body, caller, request))


async def _unless_gone(body: LeaseRequest, caller: Caller, request: Request) -> tuple[Lease, ...]:
    """What the desk grants to a client that is still there to take it."""
    state = request.app.state
    asked = asyncio.create_task(state.desk.lease(caller, body))
    gone = asyncio.create_task(_gone(request))
    try:
        await asyncio.wait({asked, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not gone.done():
            return asked.result()
        if asked.done():
            await give_back_to(state, caller, asked.result())
        return ()
    finally:
        asked.cancel()
        gone.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
