"""The check of a request's API key: rate limits, the key, its scope, then its project."""

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
        description="the project to work in; a key of one project can name only that one",
    ),
]
_bearer = HTTPBearer(auto_error=False, description="an API key: `warmscale key create`")
_Credentials = Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]


def authenticate(request: Request, key: str | None, scope: Scope) -> Caller:
    """Return the caller of a request with a key that holds `scope`.

    Raises:
        Problem: 401, 403; 429 for too many requests, or too many wrong keys.
    """
    if key is None:
        raise _unauthorized("send `Authorization: Bearer <API key>`")
    limits, digest = find_service(request.app, RateLimits), hash_key(key)
    address = request.client.host if request.client else ""
    # Before the look-up, which is the expensive step of a wrong key.
    limits.check_address(address, digest)
    try:
        # This session ends here, unlike a route's: a long-poll must not hold a connection.
        with find_service(request.app, Database).sessions.begin() as session:
            caller = check_key(session, key, scope)
    except Problem as problem:
        if problem.status == HTTPStatus.UNAUTHORIZED:
            limits.count_wrong_key(address)
        else:
            # A 403 is a request with a valid key: it counts like any other.
            limits.count_request(digest)
        raise
    limits.count_request(digest)
    return caller


def _unauthorized(detail: str) -> Problem:
    return Problem(401, "unauthorized", detail, headers={"WWW-Authenticate": "Bearer"})


def check_key(session: Session, key: str, scope: Scope) -> Caller:
    """Return the caller of a key that holds `scope`; `admin` holds every scope.

    Raises:
        Problem: 401 for a key that is unknown, expired or revoked; 403 for a missing scope.
    """
    caller = find_caller(session, key)
    if caller is None:
        raise _unauthorized("this API key is unknown, expired or revoked")
    if not caller.scopes & {scope, "admin"}:
        held = ", ".join(sorted(caller.scopes)) or "none"
        raise Problem(403, "forbidden", f"this needs scope {scope!r}; the key holds: {held}")
    return caller


def require_scope(scope: Scope) -> Callable[..., Caller]:
    """Make a FastAPI dependency that accepts only keys with `scope`, and returns the caller."""

    def find_caller_of(
        credentials: _Credentials, request: Request, project: _Project = None
    ) -> Caller:
        return authenticate(request, _read_key(credentials), scope).narrow_to(project)

    return find_caller_of


async def _find_worker(
    credentials: _Credentials, request: Request, project: _Project = None
) -> Caller:
    """Return the caller of a key with scope `work`, from the cache where it was seen lately."""
    cache = find_service(request.app, CallerCache)
    key = _read_key(credentials)
    digest, now = hash_key(key or ""), cache.read_clock()
    caller = cache.get_caller(digest)
    if caller is None:
        caller = await run_in_threadpool(authenticate, request, key, "work")
        cache.keep_caller(digest, caller, now)
    else:
        # The steps of `authenticate` that need no database.
        find_service(request.app, RateLimits).count_request(digest)
        request_context.note_facts(key_id=caller.key_id)
    return caller.narrow_to(project)


def _read_key(credentials: HTTPAuthorizationCredentials | None) -> str | None:
    return credentials.credentials if credentials else None


# A route declares the scope it needs by the type of its parameter `caller`. It passes the caller
# to its store functions, which read only rows that the caller can see.
Reader = Annotated[Caller, Depends(require_scope("read"))]
Writer = Annotated[Caller, Depends(require_scope("write"))]
Fleet = Annotated[Caller, Depends(_find_worker)]
Scraper = Annotated[Caller, Depends(require_scope("metrics"))]
