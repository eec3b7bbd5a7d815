"""API keys: hashed at rest, shown once, checked for a scope on every route."""

import hashlib
import secrets
from collections.abc import Callable
from datetime import datetime
from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from service.errors import Problem
from service.protocol import Scope
from service.tables import ApiKey

_PREFIX = "ws_"
_bearer = HTTPBearer(auto_error=False, description="an API key: `warmscale key create`")


def hash_key(key: str) -> str:
    """SHA-256, which is enough: keys are 256 random bits, not passwords."""
    return hashlib.sha256(key.encode()).hexdigest()


def create_key(
    session: Session, name: str, scopes: list[Scope], expires_at: datetime | None = None
) -> tuple[str, str]:
    """Make a key; return its id and the key itself, which is not stored."""
    key = _PREFIX + secrets.token_urlsafe(32)
    row = ApiKey(name=name, hash=hash_key(key), scopes=list(scopes), expires_at=expires_at)
    session.add(row)
    session.flush()
    return row.id, key


def revoke_key(session: Session, key_id: str) -> bool:
    """Revoke a key for good; False when there is none of that id still good."""
    revoked = session.execute(
        update(ApiKey)
        .where(ApiKey.id == key_id, ApiKey.revoked_at.is_(None))
        .values(revoked_at=func.now())
        .returning(ApiKey.id)
    )
    return revoked.scalar_one_or_none() is not None


def scopes_of(session: Session, key: str) -> frozenset[str] | None:
    """The scopes of a good key; None for an unknown, expired or revoked one."""
    scopes = session.scalar(
        select(ApiKey.scopes).where(
            ApiKey.hash == hash_key(key),
            ApiKey.revoked_at.is_(None),
            (ApiKey.expires_at.is_(None)) | (ApiKey.expires_at > func.now()),
        )
    )
    return None if scopes is None else frozenset(scopes)


def check(session: Session, key: str | None, scope: Scope) -> None:
    """Raise the problem of a key that may not do `scope`; `admin` may do everything."""
    if key is None:
        raise Problem(401, "unauthorized", "send `Authorization: Bearer <API key>`")
    scopes = scopes_of(session, key)
    if scopes is None:
        raise Problem(401, "unauthorized", "this API key is unknown, expired or revoked")
    if not scopes & {scope, "admin"}:
        held = ", ".join(sorted(scopes)) or "none"
        raise Problem(403, "forbidden", f"this needs scope {scope!r}; the key holds: {held}")


def require(scope: Scope) -> Callable[..., None]:
    """A dependency that lets a request pass only with a key that holds `scope`."""

    def dependency(
        credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
        request: Request,
    ) -> None:
        # A session of its own, closed at once: a long-poll must not hold a connection.
        with request.app.state.sessions() as session:
            check(session, credentials.credentials if credentials else None, scope)

    return dependency
