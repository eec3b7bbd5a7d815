"""`warmscale db events`: who did what, from the audit log in the database."""

import json
from datetime import UTC
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.cli.admin.session import begin_transaction
from service.cli.common import Exit, Home, Json, fail
from service.local_stack.home import DEFAULT_HOME

if TYPE_CHECKING:
    from sqlalchemy import Select
    from sqlalchemy.orm import Session

    from service.database.tables import Event


def events(
    *,
    study: Annotated[
        str | None, typer.Option(help="Only of this study: its id, its name, or PROJECT/NAME.")
    ] = None,
    actor: Annotated[
        str | None, typer.Option(help="Only what this key's id, operator or service did.")
    ] = None,
    type_: Annotated[
        str | None, typer.Option("--type", help="Only these: run.failed, or key. for all of keys.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="The newest so many.")] = 100,
    as_json: Json = False,
    home: Home = DEFAULT_HOME,
) -> None:
    """Print the audit log, oldest first: when, who, what, and of which run."""
    with begin_transaction(home) as session:
        of = None if study is None else _find_study_id(session, study)
        rows = session.scalars(_select_events(of, actor, type_).limit(limit)).all()[::-1]
        told = [_make_record(row) for row in rows]
    typer.echo(json.dumps(told) if as_json else "\n".join(map(_format_record, told)))


def _find_study_id(session: "Session", study: str) -> str:
    from sqlalchemy import or_, select

    from service.database.tables import Study

    query = select(Study.id).where(or_(Study.id == study, Study.optuna_name == study))
    found = session.scalars(query).first()
    if found is None:
        works = "give its id, its name, or PROJECT/NAME outside of the project `default`"
        fail(Exit.CONFLICT, f"--study: there is no study {study!r}; {works}")
    return found


def _select_events(study_id: str | None, actor: str | None, type_: str | None) -> "Select[Event]":
    from sqlalchemy import select

    from service.database.tables import Event

    query = select(Event).order_by(Event.id.desc())
    if study_id is not None:
        query = query.where(Event.study_id == study_id)
    if actor is not None:
        query = query.where(Event.actor == actor)
    if type_ is not None:
        same = Event.type.startswith(type_, autoescape=True)
        query = query.where(same if type_.endswith(".") else Event.type == type_)
    return query


def _make_record(row: "Event") -> dict[str, Any]:
    return {
        "id": row.id,
        "at": row.created_at.astimezone(UTC).isoformat(),
        "actor": row.actor,
        "type": row.type,
        "study_id": row.study_id,
        "run_id": row.run_id,
        "attempt": row.attempt,
        "payload": row.payload,
    }


def _format_record(one: dict[str, Any]) -> str:
    who, about = one["actor"] or "unknown", one["run_id"] or one["study_id"] or ""
    at, what = one["at"][:19].replace("T", " "), json.dumps(one["payload"])
    return f"{one['id']}  {at}  {who}  {one['type']}  {about}  {what}"
