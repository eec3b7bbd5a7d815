"""Every transition leaves a row, in the transaction that made it."""

from typing import Any

from sqlalchemy import insert
from sqlalchemy.orm import Session

from service.tables import Event


def record(
    session: Session,
    type_: str,
    *,
    study_id: str,
    run_id: str | None = None,
    attempt: int | None = None,
    **payload: Any,
) -> None:
    """Write one event, e.g. `run.leased`."""
    session.execute(
        insert(Event).values(
            study_id=study_id, run_id=run_id, type=type_, attempt=attempt, payload=payload
        )
    )
