"""Optuna's dashboard behind API keys and projects, read-only because its writes bypass leases."""

import base64
import binascii
import re
from typing import cast
from urllib.parse import urlsplit

from a2wsgi import WSGIMiddleware
from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from service.access.authentication import authenticate
from service.access.caller import Caller
from service.optuna_bridge.sampler import Sampler
from service.problems import Problem
from service.web.services import find_service

_READ_METHODS = frozenset({"GET", "HEAD"})
_NOTE = re.compile(r"/api/studies/\d+(/\d+)?/note")
# Paths that show no study, and paths that show the study with this id in Optuna. Every other path
# is a 404: a new route of a newer dashboard stays closed until a maintainer adds it here.
_PAGES = re.compile(r"/|/dashboard(/.*)?|/static/.*|/favicon\.ico|/api/meta/?|/api/studies/?")
_STUDY_PAGES = re.compile(r"/(?:api/studies|csv)/(\d+)(?:/.*)?")
_BASIC = {"WWW-Authenticate": 'Basic realm="warmscale: any user, an API key as password"'}


class Dashboard:
    """An ASGI application that needs a key of scope `read`, as Bearer or as the password of Basic.

    Browsers can send Basic: any user name, and the key as password. A key of scope `write` may
    write notes, the only writes that are allowed. Every project has a dashboard of its studies.
    """

    def __init__(self, app: FastAPI) -> None:
        self._app = app
        self._applications: dict[str | None, ASGIApp] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it with 403, 401 or 404; ignore everything but HTTP."""
        if scope["type"] != "http":
            return
        scope["app"] = self._app
        answer = await run_in_threadpool(self._admit_request, Request(scope))
        await answer(scope, receive, send)

    def _admit_request(self, request: Request) -> ASGIApp:
        path, reads = request.url.path, request.method in _READ_METHODS
        if not reads and not _NOTE.fullmatch(path):
            return PlainTextResponse("The dashboard is read-only here: use /v1.", 403)
        if not reads and not _is_from_own_page(request):
            return PlainTextResponse("This was sent by a page of another site.", 403)
        try:
            caller = authenticate(request, _read_key(request), "read" if reads else "write")
        except Problem as problem:
            headers = _BASIC if problem.status == 401 else problem.headers  # noqa: PLR2004
            return PlainTextResponse(problem.detail, problem.status, headers=headers)
        if not self._can_show(path, caller):
            return PlainTextResponse("There is nothing here.", 404)
        return self._get_dashboard(caller)

    def _can_show(self, path: str, caller: Caller) -> bool:
        if _PAGES.fullmatch(path):
            return True
        study = _STUDY_PAGES.fullmatch(path)
        name = find_service(self._app, Sampler).find_study_name(int(study[1])) if study else None
        return name is not None and caller.can_see(name)

    def _get_dashboard(self, caller: Caller) -> ASGIApp:
        application = self._applications.get(caller.project)
        if application is None:
            wsgi = find_service(self._app, Sampler).make_dashboard(caller.can_see)
            # a2wsgi and Starlette define the same ASGI type under two names.
            application = cast("ASGIApp", WSGIMiddleware(wsgi))
            self._applications[caller.project] = application
        return application


def _is_from_own_page(request: Request) -> bool:
    """Return True if a page of this service, or a program, has sent the request."""
    # Browsers attach Basic credentials to requests from any site. Without this check, a malicious
    # page could write notes as the user (cross-site request forgery).
    if request.headers.get("Authorization", "").lower().startswith("bearer "):
        return True  # no browser adds a Bearer token by itself
    origin = urlsplit(request.headers.get("Origin", ""))
    return bool(origin.netloc) and origin.netloc == request.headers.get("Host")


def _read_key(request: Request) -> str | None:
    kind, _, value = request.headers.get("Authorization", "").partition(" ")
    if kind.lower() == "bearer":
        return value
    if kind.lower() != "basic":
        return None
    try:
        return base64.b64decode(value).decode().partition(":")[2]
    except (binascii.Error, UnicodeDecodeError):
        return None
