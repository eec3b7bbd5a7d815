"""Lock a study's row until the transaction ends."""

from sqlalchemy import ColumnElement, Select, select
from sqlalchemy.orm import Session

from service.database.tables import Study


def lock_study(session: Session, study_id: str) -> Study:
    """The study's row, locked until the transaction ends. Always taken before any run's lock.

    FOR NO KEY UPDATE: an event's foreign key only asks that the row stays, and must not wait.
    """
    return session.scalars(select_locked(Study.id == study_id)).one()


def select_locked(which: ColumnElement[bool]) -> Select[Study]:
    """The query that locks a study's row."""
    query = select(Study).where(which).with_for_update(key_share=True)
    return query.execution_options(populate_existing=True)
