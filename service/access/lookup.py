"""Find a study or a run, as far as a caller can see it."""

from collections.abc import Sequence
from typing import Any, TypeVarTuple

from sqlalchemy import (
    Select,
    select,
)
from sqlalchemy.orm import Session

from service.access.caller import Caller
from service.database.tables import Run, Study
from service.problems import conflict, not_found


def find_run(session: Session, caller: Caller, run_id: str) -> Run:
    """The run of this id, as far as this caller can see.

    Raises:
        Problem: 404 when there is none.
    """
    run = session.scalars(select(Run).where(Run.id == run_id, caller.runs)).one_or_none()
    if run is None:
        raise not_found("run", run_id)
    return run


Ts = TypeVarTuple("Ts")


def find_study(session: Session, caller: Caller, name_or_id: str) -> Study:
    """The study of this id or name, as far as this caller can see.

    Raises:
        Problem: 404 when there is none; 409 for a name that several of the caller's projects have.
    """
    return _only(session.scalars(_named(select(Study), caller, name_or_id)).all(), name_or_id)


def find_study_id(session: Session, caller: Caller, name_or_id: str) -> str:
    """As `find`, its id alone."""
    query = _named(select(Study.id, Study.project), caller, name_or_id)
    return _only(session.execute(query).all(), name_or_id).id


def _named(query: Select[*Ts], caller: Caller, name_or_id: str) -> Select[*Ts]:
    named = (Study.id == name_or_id) | (Study.name == name_or_id)
    return query.where(named, caller.studies).order_by(Study.id != name_or_id, Study.project)


def _only(found: Sequence[Any], name_or_id: str) -> Any:
    if not found:
        raise not_found("study", name_or_id)
    if len(found) > 1 and found[0].id != name_or_id:
        projects = ", ".join(study.project for study in found)
        detail = f"study {name_or_id!r} is in projects {projects}; name one with ?project="
        raise conflict("ambiguous-name", detail)
    return found[0]
