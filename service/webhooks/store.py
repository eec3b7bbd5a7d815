"""Queries on webhooks and their deliveries. The session comes first; no function commits."""

import random
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import delete, func, select, tuple_, update
from sqlalchemy.orm import Session, aliased

from service.database.tables import Delivery, Event, Run, Study, Webhook
from service.events.audit_log import record_event
from service.protocol import Message
from service.webhooks.signing import create_secret

MAX_ATTEMPTS = 10
CLAIM_SECONDS = 60.0  # far longer than an attempt: after it the process that claimed is gone
KEPT_DAYS = 7
_FIRST_SECONDS = 5.0
_FACTOR = 3.0
_JITTER = 0.2


class WebhookView(Message):
    """A webhook as `webhook list` prints it, with its deliveries by state."""

    id: str
    url: str
    events: tuple[str, ...]
    project: str | None
    created_at: datetime
    waiting: int
    delivered: int
    dead: int
    last_error: str | None


@dataclass(frozen=True, kw_only=True)
class ClaimedDelivery:
    """A delivery that only this process tries for the next minute."""

    event_id: int
    webhook_id: str
    url: str
    secret: str = field(repr=False)
    attempts: int
    event: Event
    study: str
    project: str
    run: Run | None

    @property
    def body(self) -> dict[str, Any]:
        """The message. Its facts never change: every attempt sends the same text."""
        event, run = self.event, self.run
        data: dict[str, Any] = {
            "event_id": event.id,
            "project": self.project,
            "study_id": event.study_id,
            "study": self.study,
            "actor": event.actor,
            **event.payload,
        }
        if run is not None:
            data |= {"run_id": run.id, "attempt": event.attempt, "kind": run.kind}
            data |= {"trial_number": run.trial_number, "arm": run.arm, "rung": run.rung}
        return {"type": event.type, "timestamp": event.created_at.isoformat(), "data": data}

    @property
    def message_id(self) -> str:
        """The message's id, the same at every attempt: the receiver drops a repetition."""
        return f"msg_{self.event_id}_{self.webhook_id}"


def add_webhook(
    session: Session, url: str, events: list[str], project: str | None
) -> tuple[Webhook, str]:
    """Write a webhook; return it and its secret. The secret is not shown again."""
    secret = create_secret()
    row = Webhook(url=url, events=sorted(set(events)), project=project, secret=secret)
    session.add(row)
    session.flush()
    record_event(
        session, "webhook.added", study_id=None, webhook=row.id, url=url, events=row.events
    )
    return row, secret


def remove_webhook(session: Session, webhook_id: str) -> bool:
    """Delete a webhook and its deliveries; return False if no webhook has this id."""
    removed = session.execute(
        delete(Webhook).where(Webhook.id == webhook_id).returning(Webhook.url)
    ).one_or_none()
    if removed is not None:
        record_event(session, "webhook.removed", study_id=None, webhook=webhook_id, url=removed.url)
    return removed is not None


def list_webhooks(session: Session) -> tuple[WebhookView, ...]:
    """Return every webhook with its deliveries by state and the newest failure."""
    counts = [
        func.count().filter(Delivery.state == state).label(state)
        for state in ("waiting", "delivered", "dead")
    ]
    # The error of the newest event that failed; a delivered row has none.
    failed = aliased(Delivery)
    last_error = (
        select(failed.error)
        .where(failed.webhook_id == Webhook.id, failed.error.is_not(None))
        .order_by(failed.event_id.desc())
        .limit(1)
        .scalar_subquery()
        .label("last_error")
    )
    own = (Webhook.id, Webhook.url, Webhook.events, Webhook.project, Webhook.created_at)
    query = (
        select(*own, *counts, last_error)
        .outerjoin(Delivery, Delivery.webhook_id == Webhook.id)
        .group_by(Webhook.id)
        .order_by(Webhook.created_at)
    )
    return tuple(WebhookView.model_validate(dict(row)) for row in session.execute(query).mappings())


def revive_deliveries(session: Session, webhook_id: str) -> int:
    """Queue a webhook's dead deliveries again, with all their attempts; return how many."""
    again = {"state": "waiting", "attempts": 0, "next_at": func.now(), "ended_at": None}
    revived = session.execute(
        update(Delivery)
        .where(Delivery.webhook_id == webhook_id, Delivery.state == "dead")
        .values(**again)
        .returning(Delivery.event_id)
    )
    return len(revived.all())


def claim_deliveries(session: Session, limit: int) -> list[ClaimedDelivery]:
    """Claim deliveries that are due and that no other process has claimed.

    An attempt counts when it begins. A delivery that crashes its process, or whose outcome cannot
    be stored, therefore gets `MAX_ATTEMPTS` attempts like any other, and then is dead.
    """
    # SKIP LOCKED passes over rows that another replica is claiming at this moment.
    due = (
        select(Delivery.event_id, Delivery.webhook_id)
        .where(Delivery.state == "waiting", Delivery.next_at <= func.now())
        .order_by(Delivery.next_at)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    keys = [tuple(row) for row in session.execute(due)]
    if not keys:
        return []
    mine = update(Delivery).where(tuple_(Delivery.event_id, Delivery.webhook_id).in_(keys))
    # These rows used all their attempts, but the outcome of the last was never stored.
    reason = func.coalesce(Delivery.error, "the outcome of its attempts could not be stored")
    dead = {"state": "dead", "ended_at": func.now(), "error": reason}
    session.execute(mine.where(Delivery.attempts >= MAX_ATTEMPTS).values(**dead))
    # Claims and reads in a single statement: the UPDATE is a CTE of the SELECT.
    claimed = (
        mine.where(Delivery.state == "waiting")
        .values(
            attempts=Delivery.attempts + 1, next_at=func.now() + timedelta(seconds=CLAIM_SECONDS)
        )
        .returning(Delivery.event_id, Delivery.webhook_id, Delivery.attempts)
        .cte()
    )
    query = (
        select(claimed.c.attempts, Event, Webhook, Study.name, Study.project, Run)
        .join(Event, Event.id == claimed.c.event_id)
        .join(Webhook, Webhook.id == claimed.c.webhook_id)
        .join(Study, Study.id == Event.study_id)
        .outerjoin(Run, Run.id == Event.run_id)
        .add_cte(claimed)
        .order_by(Event.id)
    )
    return [
        ClaimedDelivery(
            event_id=event.id,
            webhook_id=webhook.id,
            url=webhook.url,
            secret=webhook.secret,
            attempts=attempts,
            event=event,
            study=study,
            project=project,
            run=run,
        )
        for attempts, event, webhook, study, project, run in session.execute(query)
    ]


def settle_delivery(session: Session, delivery: ClaimedDelivery, error: str | None) -> str:
    """Store an attempt's outcome: `delivered`, `failed`, or `dead` after the last attempt.

    A failure is not stored if another process has begun a later attempt.
    """
    mine = update(Delivery).where(
        Delivery.event_id == delivery.event_id,
        Delivery.webhook_id == delivery.webhook_id,
        Delivery.state == "waiting",
    )
    if error is None:  # this holds even if another process has begun a later attempt
        session.execute(mine.values(state="delivered", error=None, ended_at=func.now()))
        return "delivered"
    mine = mine.where(Delivery.attempts == delivery.attempts).values(error=error)
    if delivery.attempts >= MAX_ATTEMPTS:
        session.execute(mine.values(state="dead", ended_at=func.now()))
        return "dead"
    later = func.now() + timedelta(seconds=delay_seconds(delivery.attempts))
    session.execute(mine.values(next_at=later))
    return "failed"


def delay_seconds(attempts: int) -> float:
    """Return the seconds until the next attempt: 5 s after the first, then three times as long."""
    # 5 s, 15 s, 45 s, ..., 9 h after the ninth attempt; 14 h in all. The jitter spreads the retries
    # of events that failed together.
    base = _FIRST_SECONDS * _FACTOR ** (attempts - 1)
    return base * random.uniform(1 - _JITTER, 1 + _JITTER)  # noqa: S311 - jitter


def delete_old_deliveries(session: Session) -> None:
    """Delete deliveries that succeeded more than a week ago."""
    old = func.now() - timedelta(days=KEPT_DAYS)
    session.execute(delete(Delivery).where(Delivery.state == "delivered", Delivery.ended_at < old))
