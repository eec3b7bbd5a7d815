"""Every transition leaves a row, in the transaction that made it: the audit log.

What else there is to tell, a line in the log and a count, is told once the transaction has
committed: a rolled back transition did not happen.
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

# After these a run may be leasable: one waits, or there is room for one more trial.
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
# What a webhook may be told.
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
_UNTOLD = "untold events"  # in a session's own `info`
_log = logging.getLogger(__name__)

NewEvent = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class _Untold:
    events: Sequence[NewEvent]
    within: SessionTransaction | None


# One statement of one shape, which is compiled and planned once: rows as `VALUES` are compiled anew
# every time, 2 ms. Ids are drawn in the order of the events. A trial is queued to be leased in the
# same transaction, so nobody is woken for it; the outbox is woken for what a webhook is to be told.
_RECORD = text("""
WITH told AS (
    INSERT INTO warmscale.events (study_id, run_id, actor, type, attempt, payload)
    SELECT study_id, run_id, actor, type, attempt, payload
    FROM ROWS FROM (json_to_recordset(CAST(:events AS json)) AS (
        study_id text, run_id text, actor text, type text, attempt integer, payload jsonb
    )) WITH ORDINALITY AS one (study_id, run_id, actor, type, attempt, payload, place)
    ORDER BY place
    RETURNING id, study_id, run_id, type, payload
), posted AS (
    INSERT INTO warmscale.deliveries (event_id, webhook_id)
    SELECT told.id, webhook.id
    FROM told
    JOIN warmscale.webhooks AS webhook ON told.type = ANY (webhook.events)
    JOIN warmscale.studies AS study ON study.id = told.study_id
    WHERE told.type = ANY (CAST(:notified AS text[]))
        AND (webhook.project IS NULL OR webhook.project = study.project)
    RETURNING event_id
)
SELECT pg_notify(:channel, concat_ws(' ', study_id, run_id,
    CASE WHEN type = ANY (CAST(:makes_work AS text[])) AND NOT payload ? 'trial' THEN :work END,
    CASE WHEN id IN (SELECT event_id FROM posted) THEN :webhooks END))
FROM told
""")
_WORDS: dict[str, Any] = {
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
    """An event to be written, e.g. `run.leased`; the doing of whoever asks, unless said."""
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
    """Write one event, and wake with the commit who waits for such."""
    one = new_event(type_, study_id=study_id, run_id=run_id, attempt=attempt, **payload)
    record_events(session, [one])


def record_events(session: Session, events: Sequence[NewEvent]) -> None:
    """Write events in this order, and wake with the commit who waits for such.

    Those that webhooks want are put into the outbox with them.
    """
    session.execute(_RECORD, _WORDS | {"events": json.dumps(events)})
    untold = _Untold(events=events, within=session.get_nested_transaction())
    session.info.setdefault(_UNTOLD, []).append(untold)


def install_hooks(sessions: sessionmaker[Session]) -> None:
    """Tell of the events of these sessions when they have committed."""

    @hooks.listens_for(sessions, "after_commit")
    def committed(session: Session) -> None:
        if session.in_nested_transaction():
            return  # a savepoint: what is around it may still roll back
        for untold in session.info.pop(_UNTOLD, ()):
            for one in untold.events:
                _tell(one)

    @hooks.listens_for(sessions, "after_soft_rollback")
    def rolled_back(session: Session, previous: SessionTransaction) -> None:
        left = session.info.pop(_UNTOLD, [])
        if previous.nested:
            session.info[_UNTOLD] = [one for one in left if not _is_inside(one.within, previous)]


def _is_inside(savepoint: SessionTransaction | None, other: SessionTransaction) -> bool:
    """Whether it is the other, or was released into it."""
    while savepoint is not None and savepoint is not other:
        savepoint = savepoint.parent
    return savepoint is not None


def _tell(one: NewEvent) -> None:
    payload: dict[str, Any] = one["payload"]
    metrics.count_event(one["type"], payload)
    tracing.add_event_span(one["type"], one["run_id"], one["attempt"], one["actor"])
    if _log.isEnabledFor(logging.INFO):
        more = {name: payload.get(name) for name in _LOGGED}
        short = {name: v[:_LONGEST] if isinstance(v, str) else v for name, v in more.items()}
        about = {"study": "study_id", "run": "run_id", "attempt": "attempt", "actor": "actor"}
        _log.info(one["type"], extra={name: one[key] for name, key in about.items()} | short)
