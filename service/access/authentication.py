"""API keys: hashed at rest, shown once, checked for a scope on every route."""

from collections.abc import Callable
from http import HTTPStatus
from typing import Annotated

from fastapi import Depends, Query, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from service.access.caller import Caller
from service.access.caller_cache import CallerCache
from service.access.keys import find_caller, hash_key
from service.access.rate_limits import RateLimits
from service.observability import request_context
from service.problems import Problem
from service.protocol import PROJECT_PATTERN, Scope
from service.web.services import Database, find_service

_Project = Annotated[
    str | None,
    Query(
        pattern=PROJECT_PATTERN,
        description="the project to work in; a key of one project has no other",
    ),
]
_bearer = HTTPBearer(auto_error=False, description="an API key: `warmscale key create`")
_Credentials = Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]


def authenticate(request: Request, key: str | None, scope: Scope) -> Caller:
    """Give the caller of a request, whose key may do `scope`.

    Raises:
        Problem: 401, 403; 429 for too many requests, or too many wrong keys.
    """
    if key is None:
        raise _unauthorized("send `Authorization: Bearer <API key>`")
    limits, digest = find_service(request.app, RateLimits), hash_key(key)
    address = request.client.host if request.client else ""
    limits.check_address(address, digest)
    try:
        # A session of its own, closed at once: a long-poll must not hold a connection.
        with find_service(request.app, Database).sessions.begin() as session:
            caller = check_key(session, key, scope)
    except Problem as problem:
        if problem.status == HTTPStatus.UNAUTHORIZED:
            limits.count_wrong_key(address)
        else:
            limits.count_request(digest)  # a key that may not do this counts as any other
        raise
    limits.count_request(digest)
    return caller


def _unauthorized(detail: str) -> Problem:
    return Problem(401, "unauthorized", detail, headers={"WWW-Authenticate": "Bearer"})


def check_key(session: Session, key: str, scope: Scope) -> Caller:
    """Give the caller, or raise the problem of a key that may not do `scope`.

    `admin` may do everything.
    """
    caller = find_caller(session, key)
    if caller is None:
        raise _unauthorized("this API key is unknown, expired or revoked")
    if not caller.scopes & {scope, "admin"}:
        held = ", ".join(sorted(caller.scopes)) or "none"
        raise Problem(403, "forbidden", f"this needs scope {scope!r}; the key holds: {held}")
    return caller


def require_scope(scope: Scope) -> Callable[..., Caller]:
    """A dependency that lets a request pass only with a key that holds `scope`."""

    def dependency(credentials: _Credentials, request: Request, project: _Project = None) -> Caller:
        return authenticate(request, _key(credentials), scope).narrow_to(project)

    return dependency


async def _recent_worker(
    credentials: _Credentials, request: Request, project: _Project = None
) -> Caller:
    """As `require("work")`, of a key that may have been looked up a moment ago."""
    recent = find_service(request.app, CallerCache)
    key = _key(credentials)
    name, now = hash_key(key or ""), recent.now()
    caller = recent.get(name)
    if caller is None:
        caller = await run_in_threadpool(authenticate, request, key, "work")
        recent.keep(name, caller, now)
    else:
        find_service(request.app, RateLimits).count_request(name)
        request_context.note_facts(key_id=caller.key_id)
    return caller.narrow_to(project)


def _key(credentials: HTTPAuthorizationCredentials | None) -> str | None:
    return credentials.credentials if credentials else None


# A route says by its parameter which scope it needs, and passes the caller on to what it reads.
Reader = Annotated[Caller, Depends(require_scope("read"))]
Writer = Annotated[Caller, Depends(require_scope("write"))]
Fleet = Annotated[Caller, Depends(_recent_worker)]
Scraper = Annotated[Caller, Depends(require_scope("metrics"))]
