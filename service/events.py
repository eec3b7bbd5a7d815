"""Every transition leaves a row, in the transaction that made it."""

from typing import Any

from sqlalchemy import func, insert
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


def record(
    session: Session,
    type_: str,
    *,
    study_id: str,
    run_id: str | None = None,
    attempt: int | None = None,
    **payload: Any,
) -> None:
    """Write one event, e.g. `run.leased`, and wake with the commit who waits for such."""
    event = insert(Event).values(
        study_id=study_id, run_id=run_id, type=type_, attempt=attempt, payload=payload
    )
    # A trial is queued to be leased in the same transaction.
    work = WORK if type_ in _MAKES_WORK and "trial" not in payload else ""
    notice = f"{study_id} {run_id or ''} {work}"
    session.execute(event.returning(func.pg_notify(CHANNEL, notice)))
