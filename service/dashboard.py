"""Optuna's dashboard, behind our keys and read-only: its write routes would bypass leases."""

import base64
import binascii
from typing import cast

from a2wsgi import WSGIMiddleware
from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from service.auth import check
from service.errors import Problem
from service.sampler import Sampler

_READ_METHODS = frozenset({"GET", "HEAD"})


def asgi(sampler: Sampler) -> ASGIApp:
    """The dashboard, which is a WSGI application, for a server that speaks ASGI."""
    return cast("ASGIApp", WSGIMiddleware(sampler.dashboard()))  # two spellings of one type


def guarded(dashboard: ASGIApp, app: FastAPI) -> ASGIApp:
    """Let a request through with a key of scope `read`, as Bearer or as the password of Basic.

    Basic is what a browser can send: any user name, the key as password. Notes may be written
    with scope `write`; nothing else may.
    """

    async def guard(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        request = Request(scope)
        refusal = await run_in_threadpool(_refuse, request, app)
        await (refusal or dashboard)(scope, receive, send)

    return guard


def _refuse(request: Request, app: FastAPI) -> ASGIApp | None:
    reads = request.method in _READ_METHODS
    if not reads and not request.url.path.endswith("/note"):
        return PlainTextResponse("The dashboard is read-only here: use /v1.", 403)
    try:
        with app.state.sessions() as session:
            check(session, _key(request), "read" if reads else "write")
    except Problem as problem:
        basic = {"WWW-Authenticate": 'Basic realm="warmscale: any user, an API key as password"'}
        headers = basic if problem.status == 401 else None  # noqa: PLR2004
        return PlainTextResponse(problem.detail, problem.status, headers=headers)
    return None


def _key(request: Request) -> str | None:
    kind, _, value = request.headers.get("Authorization", "").partition(" ")
    if kind.lower() == "bearer":
        return value
    if kind.lower() != "basic":
        return None
    try:
        return base64.b64decode(value).decode().partition(":")[2]
    except (binascii.Error, UnicodeDecodeError):
        return None
