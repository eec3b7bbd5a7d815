"""`POST /v1/leases`: the one way work leaves the service."""

import time

from fastapi import APIRouter, Depends, Request
from starlette.concurrency import run_in_threadpool

from service.auth import require
from service.errors import may_answer
from service.leases import store
from service.protocol import LeaseReply, LeaseRequest

router = APIRouter(tags=["leases"])
_POLL_SECONDS = 0.25


@router.post(
    "/leases",
    dependencies=[Depends(require("work"))],
    responses=may_answer(404, "There is no such study."),
)
async def lease(body: LeaseRequest, request: Request) -> LeaseReply:
    """Lease runs that fit; wait up to `wait_seconds` for some, holding no connection."""
    state = request.app.state
    deadline = time.monotonic() + body.wait_seconds
    while not state.drain.begun:
        leases = await run_in_threadpool(
            store.lease, state.sessions, state.sampler, state.settings, state.presence, body
        )
        if await request.is_disconnected():
            await run_in_threadpool(store.give_back, state.sessions, leases)
            break
        if leases or time.monotonic() >= deadline:
            return LeaseReply(leases=leases)
        await state.drain.pause(_POLL_SECONDS)
    return LeaseReply(leases=())
