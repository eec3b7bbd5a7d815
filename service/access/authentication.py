"""API keys: hashed at rest, shown once, checked for a scope on every route."""

import hashlib
import secrets
from collections.abc import Callable
from datetime import datetime, timedelta
from http import HTTPStatus
from typing import Annotated, Literal

from fastapi import Depends, Query, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from sqlalchemy import case, func, select, update
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from service import context
from service.caller import Caller
from service.errors import Problem
from service.events import record
from service.protocol import PROJECT_PATTERN, Message, Scope
from service.recent import RecentCallers  # noqa: TC001 - FastAPI reads annotations
from service.tables import DEFAULT_PROJECT, ApiKey

_PREFIX = "ws_"
_Project = Annotated[
    str | None,
    Query(
        pattern=PROJECT_PATTERN,
        description="the project to work in; a key of one project has no other",
    ),
]
_bearer = HTTPBearer(auto_error=False, description="an API key: `warmscale key create`")
_Credentials = Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]


def hash_key(key: str) -> str:
    """SHA-256, which is enough: keys are 256 random bits, not passwords."""
    return hashlib.sha256(key.encode()).hexdigest()


def create_key(
    session: Session,
    name: str,
    scopes: list[Scope],
    *,
    project: str | None = None,
    expires_at: datetime | None = None,
) -> tuple[str, str]:
    """Make a key; return its id and the key itself, which is not stored.

    Without a project it sees every one if it is an admin's, a fleet's (its sole scope is `work`),
    or `metrics` is its sole scope; and project `default` if not.
    """
    key = _PREFIX + secrets.token_urlsafe(32)
    if project is None and not _may_be_everywhere(scopes):
        project = DEFAULT_PROJECT
    row = ApiKey(
        name=name, hash=hash_key(key), scopes=list(scopes), project=project, expires_at=expires_at
    )
    session.add(row)
    session.flush()
    record(
        session,
        "key.created",
        study_id=None,
        key=row.id,
        name=name,
        scopes=list(scopes),
        project=project,
    )
    return row.id, key


def _may_be_everywhere(scopes: list[Scope]) -> bool:
    return "admin" in scopes or set(scopes) in ({"work"}, {"metrics"})


def revoke_key(session: Session, key_id: str) -> bool:
    """Revoke a key for good; False when there is none of that id still good."""
    revoked = session.execute(
        update(ApiKey)
        .where(ApiKey.id == key_id, ApiKey.revoked_at.is_(None))
        .values(revoked_at=func.now())
        .returning(ApiKey.id)
    )
    is_revoked = revoked.scalar_one_or_none() is not None
    if is_revoked:
        record(session, "key.revoked", study_id=None, key=key_id)
    return is_revoked


class KeyView(Message):
    """A key as it is listed; nothing here lets anybody in."""

    id: str
    name: str
    scopes: tuple[str, ...]
    project: str | None
    state: Literal["good", "expired", "revoked"]
    created_at: datetime
    expires_at: datetime | None
    last_used_at: datetime | None


def list_keys(session: Session) -> tuple[KeyView, ...]:
    """Every key, newest first."""
    state = case(
        (ApiKey.revoked_at.is_not(None), "revoked"),
        (ApiKey.expires_at <= func.now(), "expired"),
        else_="good",
    )
    columns = [getattr(ApiKey, name) for name in KeyView.model_fields if name != "state"]
    query = select(*columns, state.label("state")).order_by(ApiKey.created_at.desc(), ApiKey.id)
    return tuple(KeyView.model_validate(dict(row)) for row in session.execute(query).mappings())


_GOOD = (
    ApiKey.revoked_at.is_(None),
    (ApiKey.expires_at.is_(None)) | (ApiKey.expires_at > func.now()),
)


def is_good(session: Session, key_id: str) -> bool:
    """Whether a key that was good is still neither revoked nor expired."""
    return session.scalar(select(ApiKey.id).where(ApiKey.id == key_id, *_GOOD)) is not None


def caller_of(session: Session, key: str) -> Caller | None:
    """The caller with a good key; None for an unknown, expired or revoked one."""
    unnoted = func.coalesce(ApiKey.last_used_at < func.now() - timedelta(minutes=1), True)
    query = select(ApiKey.id, ApiKey.scopes, ApiKey.project, unnoted.label("unnoted")).where(
        ApiKey.hash == hash_key(key), *_GOOD
    )
    row = session.execute(query).one_or_none()
    if row is None:
        return None
    if row.unnoted:  # to the minute: a write for every request would be a lock for every request
        noted = update(ApiKey).where(ApiKey.id == row.id, unnoted).values(last_used_at=func.now())
        session.execute(noted)
    context.note(key_id=row.id)
    return Caller(key_id=row.id, scopes=frozenset(row.scopes), project=row.project)


def enter(request: Request, key: str | None, scope: Scope) -> Caller:
    """Give the caller of a request, whose key may do `scope`.

    Raises:
        Problem: 401, 403; 429 for too many requests, or too many wrong keys.
    """
    if key is None:
        raise _unauthorized("send `Authorization: Bearer <API key>`")
    limits, digest = request.app.state.limits, hash_key(key)
    address = request.client.host if request.client else ""
    limits.knock(address, digest)
    try:
        # A session of its own, closed at once: a long-poll must not hold a connection.
        with request.app.state.sessions.begin() as session:
            caller = check(session, key, scope)
    except Problem as problem:
        if problem.status == HTTPStatus.UNAUTHORIZED:
            limits.wrong(address)
        else:
            limits.good(digest)  # a key that may not do this counts as any other
        raise
    limits.good(digest)
    return caller


def _unauthorized(detail: str) -> Problem:
    return Problem(401, "unauthorized", detail, headers={"WWW-Authenticate": "Bearer"})


def check(session: Session, key: str, scope: Scope) -> Caller:
    """Give the caller, or raise the problem of a key that may not do `scope`.

    `admin` may do everything.
    """
    caller = caller_of(session, key)
    if caller is None:
        raise _unauthorized("this API key is unknown, expired or revoked")
    if not caller.scopes & {scope, "admin"}:
        held = ", ".join(sorted(caller.scopes)) or "none"
        raise Problem(403, "forbidden", f"this needs scope {scope!r}; the key holds: {held}")
    return caller


def require(scope: Scope) -> Callable[..., Caller]:
    """A dependency that lets a request pass only with a key that holds `scope`."""

    def dependency(credentials: _Credentials, request: Request, project: _Project = None) -> Caller:
        return enter(request, _key(credentials), scope).within(project)

    return dependency


async def _recent_worker(
    credentials: _Credentials, request: Request, project: _Project = None
) -> Caller:
    """As `require("work")`, of a key that may have been looked up a moment ago."""
    recent: RecentCallers = request.app.state.recent
    key = _key(credentials)
    name, now = hash_key(key or ""), recent.now()
    caller = recent.get(name)
    if caller is None:
        caller = await run_in_threadpool(enter, request, key, "work")
        recent.keep(name, caller, now)
    else:
        request.app.state.limits.good(name)
        context.note(key_id=caller.key_id)
    return caller.within(project)


def _key(credentials: HTTPAuthorizationCredentials | None) -> str | None:
    return credentials.credentials if credentials else None


# A route says by its parameter which scope it needs, and passes the caller on to what it reads.
Reader = Annotated[Caller, Depends(require("read"))]
Writer = Annotated[Caller, Depends(require("write"))]
Fleet = Annotated[Caller, Depends(_recent_worker)]
Scraper = Annotated[Caller, Depends(require("metrics"))]
