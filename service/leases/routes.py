"""`POST /v1/leases`: the one way work leaves the service."""

import asyncio

from fastapi import APIRouter, Depends, Request

from service.auth import require
from service.errors import may_answer
from service.leases.desk import give_back_to
from service.protocol import Lease, LeaseReply, LeaseRequest

router = APIRouter(tags=["leases"])


@router.post(
    "/leases",
    dependencies=[Depends(require("work"))],
    responses=may_answer(404, "There is no such study."),
)
async def lease(body: LeaseRequest, request: Request) -> LeaseReply:
    """Lease runs that fit; wait up to `wait_seconds` for some, holding no connection."""
    return LeaseReply(leases=await _unless_gone(body, request))


async def _unless_gone(body: LeaseRequest, request: Request) -> tuple[Lease, ...]:
    """What the desk grants to a client that is still there to take it."""
    state = request.app.state
    asked, gone = asyncio.create_task(state.desk.lease(body)), asyncio.create_task(_gone(request))
    try:
        await asyncio.wait({asked, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not gone.done():
            return asked.result()
        if asked.done():
            await give_back_to(state, asked.result())
        return ()
    finally:
        asked.cancel()
        gone.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
