"""API keys in the database: create, list and revoke them, find the caller of a key; no FastAPI."""

import hashlib
import secrets
from datetime import datetime, timedelta
from typing import Literal

from sqlalchemy import case, func, select, update
from sqlalchemy.orm import Session

from service.access.caller import Caller
from service.database.tables import DEFAULT_PROJECT, ApiKey
from service.events.audit_log import record_event
from service.observability import request_context
from service.protocol import Message, Scope

_PREFIX = "ws_"


def hash_key(key: str) -> str:
    """Return the SHA-256 of a key: a slow hash is for passwords, a key is 256 random bits."""
    return hashlib.sha256(key.encode()).hexdigest()


def create_key(
    session: Session,
    name: str,
    scopes: list[Scope],
    *,
    project: str | None = None,
    expires_at: datetime | None = None,
) -> tuple[str, str]:
    """Create a key; return its id and the key itself; only its hash is stored.

    A key without a project sees every project if it has scope `admin`, or `work` alone (a fleet's
    key), or `metrics` alone. Any other key without a project sees project `default`.
    """
    key = _PREFIX + secrets.token_urlsafe(32)
    if project is None and not _may_see_all_projects(scopes):
        project = DEFAULT_PROJECT
    row = ApiKey(
        name=name, hash=hash_key(key), scopes=list(scopes), project=project, expires_at=expires_at
    )
    session.add(row)
    session.flush()
    record_event(
        session,
        "key.created",
        study_id=None,
        key=row.id,
        name=name,
        scopes=list(scopes),
        project=project,
    )
    return row.id, key


def _may_see_all_projects(scopes: list[Scope]) -> bool:
    return "admin" in scopes or set(scopes) in ({"work"}, {"metrics"})


def revoke_key(session: Session, key_id: str) -> bool:
    """Revoke a key for good; return False if no key of this id is left to revoke."""
    revoked = session.execute(
        update(ApiKey)
        .where(ApiKey.id == key_id, ApiKey.revoked_at.is_(None))
        .values(revoked_at=func.now())
        .returning(ApiKey.id)
    )
    is_revoked = revoked.scalar_one_or_none() is not None
    if is_revoked:
        record_event(session, "key.revoked", study_id=None, key=key_id)
    return is_revoked


class KeyView(Message):
    """A key as `key list` prints it, without the key itself."""

    id: str
    name: str
    scopes: tuple[str, ...]
    project: str | None
    state: Literal["good", "expired", "revoked"]
    created_at: datetime
    expires_at: datetime | None
    last_used_at: datetime | None


def list_keys(session: Session) -> tuple[KeyView, ...]:
    """Return every key, newest first."""
    state = case(
        # A key that is both was revoked by somebody: that is the more useful answer.
        (ApiKey.revoked_at.is_not(None), "revoked"),
        (ApiKey.expires_at <= func.now(), "expired"),
        else_="good",
    )
    columns = [getattr(ApiKey, name) for name in KeyView.model_fields if name != "state"]
    query = select(*columns, state.label("state")).order_by(ApiKey.created_at.desc(), ApiKey.id)
    return tuple(KeyView.model_validate(dict(row)) for row in session.execute(query).mappings())


_IS_GOOD = (
    ApiKey.revoked_at.is_(None),
    (ApiKey.expires_at.is_(None)) | (ApiKey.expires_at > func.now()),
)


def is_key_good(session: Session, key_id: str) -> bool:
    """Return whether the key of this id is neither revoked nor expired."""
    return session.scalar(select(ApiKey.id).where(ApiKey.id == key_id, *_IS_GOOD)) is not None


def find_caller(session: Session, key: str) -> Caller | None:
    """Return the caller of a key; None if the key is unknown, expired or revoked."""
    # The last use is kept to the minute: a write for every request would also lock the row for
    # every request, and the requests of a fleet share one key.
    is_stale = func.coalesce(ApiKey.last_used_at < func.now() - timedelta(minutes=1), True)
    query = select(ApiKey.id, ApiKey.scopes, ApiKey.project, is_stale.label("is_stale")).where(
        ApiKey.hash == hash_key(key), *_IS_GOOD
    )
    row = session.execute(query).one_or_none()
    if row is None:
        return None
    if row.is_stale:
        write = update(ApiKey).where(ApiKey.id == row.id, is_stale).values(last_used_at=func.now())
        session.execute(write)
    request_context.note_facts(key_id=row.id)
    return Caller(key_id=row.id, scopes=frozenset(row.scopes), project=row.project)
