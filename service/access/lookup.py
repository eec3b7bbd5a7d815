"""Studies and runs by name or id, among those that a caller can see."""

from collections.abc import Sequence
from typing import Any, TypeVarTuple

from sqlalchemy import Select, select
from sqlalchemy.orm import Session

from service.access.caller import Caller
from service.database.tables import Run, Study
from service.problems import conflict, not_found

Ts = TypeVarTuple("Ts")


def find_run(session: Session, caller: Caller, run_id: str) -> Run:
    """Return the run of this id.

    Raises:
        Problem: 404 if it does not exist, or this caller cannot see it.
    """
    run = session.scalars(select(Run).where(Run.id == run_id, caller.run_filter)).one_or_none()
    if run is None:
        raise not_found("run", run_id)
    return run


def find_study(session: Session, caller: Caller, name_or_id: str) -> Study:
    """Return the study of this id or name.

    Raises:
        Problem: 404 if it does not exist, or this caller cannot see it; 409 if several projects of
            the caller have a study of this name.
    """
    query = _filter_by_name(select(Study), caller, name_or_id)
    return _take_only(session.scalars(query).all(), name_or_id)


def find_study_id(session: Session, caller: Caller, name_or_id: str) -> str:
    """Return the id of the study that `find_study` returns; raises the same problems."""
    query = _filter_by_name(select(Study.id, Study.project), caller, name_or_id)
    return _take_only(session.execute(query).all(), name_or_id).id


def _filter_by_name(query: Select[*Ts], caller: Caller, name_or_id: str) -> Select[*Ts]:
    # The study of this id comes first: another study may have that id as its name.
    named = (Study.id == name_or_id) | (Study.name == name_or_id)
    return query.where(named, caller.study_filter).order_by(Study.id != name_or_id, Study.project)


def _take_only(found: Sequence[Any], name_or_id: str) -> Any:
    if not found:
        raise not_found("study", name_or_id)
    if len(found) > 1 and found[0].id != name_or_id:
        projects = ", ".join(study.project for study in found)
        detail = f"study {name_or_id!r} is in projects {projects}; name one with ?project="
        raise conflict("ambiguous-name", detail)
    return found[0]
