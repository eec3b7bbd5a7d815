"""API keys in the database: create, list, revoke, and find the caller of a key (no FastAPI)."""

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
        record_event(session, "key.revoked", study_id=None, key=key_id)
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


def is_key_good(session: Session, key_id: str) -> bool:
    """Whether a key that was good is still neither revoked nor expired."""
    return session.scalar(select(ApiKey.id).where(ApiKey.id == key_id, *_GOOD)) is not None


def find_caller(session: Session, key: str) -> Caller | None:
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
    request_context.note_facts(key_id=row.id)
    return Caller(key_id=row.id, scopes=frozenset(row.scopes), project=row.project)
