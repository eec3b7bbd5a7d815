"""The audit log: each transition writes a row to `events` in the transaction that makes it.

An event also has a log line, a count and a span of its run's trace. Those are written after the
commit, because a transition that is rolled back did not happen.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import event as hooks
from sqlalchemy import text
from sqlalchemy.orm import Session, SessionTransaction, sessionmaker

from service.events.wakeups import CHANNEL, WEBHOOKS, WORK
from service.observability import metrics, request_context, tracing

# After these events a run may be leasable: a run is queued, or a study has room for another trial.
_MAKES_WORK = frozenset(
    {
        "study.created",
        "study.active",
        "run.queued",
        "run.succeeded",
        "run.pruned",
        "run.failed",
        "run.cancelled",
    }
)
# The events that a webhook can subscribe to.
NOTIFIED = frozenset(
    {
        "study.completed",
        "study.failed",
        "study.cancelled",
        "run.succeeded",
        "run.pruned",
        "run.failed",
        "run.cancelled",
    }
)
_LOGGED = ("worker", "kind", "trial", "arm", "outcome", "reason", "error", "key")
_LONGEST = 300
_UNPUBLISHED = "unpublished events"  # the key in `Session.info`
_log = logging.getLogger(__name__)

NewEvent = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class _Unpublished:
    """Events that are written but not committed, and their savepoint if they are in a savepoint."""

    events: Sequence[NewEvent]
    savepoint: SessionTransaction | None


# The events are a single JSON parameter: the statement is compiled and planned once. Rows as
# `VALUES` would be compiled anew for each number of rows, 2 ms each time. `ORDER BY place` assigns
# ids in the order of the events.
# `written` holds the new rows, `queued` those that a webhook subscribed to. A notification per
# event lists the topics to wake, "st_1 run_7 work webhooks" for example. The transaction that
# queues a new trial also leases it: that `run.queued` wakes no lease request.
_WRITE_EVENTS = text("""
WITH written AS (
    INSERT INTO warmscale.events (study_id, run_id, actor, type, attempt, payload)
    SELECT study_id, run_id, actor, type, attempt, payload
    FROM ROWS FROM (json_to_recordset(CAST(:events AS json)) AS (
        study_id text, run_id text, actor text, type text, attempt integer, payload jsonb
    )) WITH ORDINALITY AS event (study_id, run_id, actor, type, attempt, payload, place)
    ORDER BY place
    RETURNING id, study_id, run_id, type, payload
), queued AS (
    INSERT INTO warmscale.deliveries (event_id, webhook_id)
    SELECT written.id, webhook.id
    FROM written
    JOIN warmscale.webhooks AS webhook ON written.type = ANY (webhook.events)
    JOIN warmscale.studies AS study ON study.id = written.study_id
    WHERE written.type = ANY (CAST(:notified AS text[]))
        AND (webhook.project IS NULL OR webhook.project = study.project)
    RETURNING event_id
)
SELECT pg_notify(:channel, concat_ws(' ', study_id, run_id,
    CASE WHEN type = ANY (CAST(:makes_work AS text[])) AND NOT payload ? 'trial' THEN :work END,
    CASE WHEN id IN (SELECT event_id FROM queued) THEN :webhooks END))
FROM written
""")
_CONSTANTS: dict[str, Any] = {
    "channel": CHANNEL,
    "notified": sorted(NOTIFIED),
    "makes_work": sorted(_MAKES_WORK),
    "work": WORK,
    "webhooks": WEBHOOKS,
}


def new_event(
    type_: str,
    *,
    study_id: str | None,
    run_id: str | None = None,
    attempt: int | None = None,
    actor: str | None = None,
    **payload: Any,
) -> NewEvent:
    """Make an event such as `run.leased`; its actor is the caller of the request unless given."""
    row = {"study_id": study_id, "run_id": run_id, "type": type_, "attempt": attempt}
    return row | {"actor": actor or request_context.current_actor(), "payload": payload}


def record_event(
    session: Session,
    type_: str,
    *,
    study_id: str | None,
    run_id: str | None = None,
    attempt: int | None = None,
    **payload: Any,
) -> None:
    """Write an event; the commit notifies the subscribers of its topics."""
    event = new_event(type_, study_id=study_id, run_id=run_id, attempt=attempt, **payload)
    record_events(session, [event])


def record_events(session: Session, events: Sequence[NewEvent]) -> None:
    """Write events in this order, with a delivery for each webhook that subscribed to them.

    The commit notifies the subscribers of their topics.
    """
    session.execute(_WRITE_EVENTS, _CONSTANTS | {"events": json.dumps(events)})
    unpublished = _Unpublished(events=events, savepoint=session.get_nested_transaction())
    session.info.setdefault(_UNPUBLISHED, []).append(unpublished)


def install_hooks(sessions: sessionmaker[Session]) -> None:
    """Log, count and trace the events of these sessions after each commit."""

    @hooks.listens_for(sessions, "after_commit")
    def publish_events(session: Session) -> None:
        if session.in_nested_transaction():
            return  # a savepoint was released: the transaction around it may still roll back
        for unpublished in session.info.pop(_UNPUBLISHED, ()):
            for event in unpublished.events:
                _publish_event(event)

    @hooks.listens_for(sessions, "after_soft_rollback")
    def drop_events(session: Session, previous: SessionTransaction) -> None:
        pending = session.info.pop(_UNPUBLISHED, [])
        # The rollback of a savepoint undoes only the events that were written inside it.
        if previous.nested:
            session.info[_UNPUBLISHED] = [
                events for events in pending if not _is_inside(events.savepoint, previous)
            ]


def _is_inside(savepoint: SessionTransaction | None, other: SessionTransaction) -> bool:
    """Return whether the savepoint is `other` or lies within it."""
    while savepoint is not None and savepoint is not other:
        savepoint = savepoint.parent
    return savepoint is not None


def _publish_event(event: NewEvent) -> None:
    payload: dict[str, Any] = event["payload"]
    metrics.count_event(event["type"], payload)
    tracing.add_event_span(event["type"], event["run_id"], event["attempt"], event["actor"])
    if _log.isEnabledFor(logging.INFO):
        logged = {name: payload.get(name) for name in _LOGGED}
        short = {name: v[:_LONGEST] if isinstance(v, str) else v for name, v in logged.items()}
        subject = {"study": "study_id", "run": "run_id", "attempt": "attempt", "actor": "actor"}
        _log.info(event["type"], extra={name: event[key] for name, key in subject.items()} | short)
