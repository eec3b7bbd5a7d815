"""Every transition leaves a row, in the transaction that made it."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import case, func, insert, literal
from sqlalchemy.orm import Session

from service.tables import Event
from service.wakeups import CHANNEL, WORK

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


NewEvent = dict[str, Any]
# A trial is queued to be leased in the same transaction.
_work = case(
    (Event.type.in_(_MAKES_WORK) & ~Event.payload.has_key("trial"), WORK), else_=literal(None)
)
_notify = func.pg_notify(CHANNEL, func.concat_ws(" ", Event.study_id, Event.run_id, _work))


def event(
    type_: str,
    *,
    study_id: str,
    run_id: str | None = None,
    attempt: int | None = None,
    **payload: Any,
) -> NewEvent:
    """An event to be written, e.g. `run.leased`."""
    row = {"study_id": study_id, "run_id": run_id, "type": type_, "attempt": attempt}
    return row | {"payload": payload}


def record(
    session: Session,
    type_: str,
    *,
    study_id: str,
    run_id: str | None = None,
    attempt: int | None = None,
    **payload: Any,
) -> None:
    """Write one event, and wake with the commit who waits for such."""
    one = event(type_, study_id=study_id, run_id=run_id, attempt=attempt, **payload)
    record_all(session, [one])


def record_all(session: Session, events: Sequence[NewEvent]) -> None:
    """Write events in this order, and wake with the commit who waits for such."""
    session.execute(insert(Event).values(events).returning(_notify))
