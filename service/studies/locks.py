"""Locks on a study's row."""

from sqlalchemy import ColumnElement, Select, select
from sqlalchemy.orm import Session

from service.database.tables import Study


def lock_study(session: Session, study_id: str) -> Study:
    """Lock a study's row until the transaction ends, and return it.

    Every transaction takes this lock before it locks a run of the study. In another order two
    transactions could wait for each other.
    """
    return session.scalars(select_locked(Study.id == study_id)).one()


def select_locked(condition: ColumnElement[bool]) -> Select[Study]:
    """Return the query that locks a study's row and reads it as it is after the wait.

    The lock is FOR NO KEY UPDATE: an insert of an event, whose foreign key only needs the row to
    stay, does not wait for it.
    """
    # Without `populate_existing` the session would return a row that it read before the wait.
    query = select(Study).where(condition).with_for_update(key_share=True)
    return query.execution_options(populate_existing=True)
