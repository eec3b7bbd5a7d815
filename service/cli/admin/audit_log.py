"""`warmscale db events`: the audit log of the database."""

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
        str | None,
        typer.Option(help="Only events of this study: its id, its name, or PROJECT/NAME."),
    ] = None,
    actor: Annotated[
        str | None,
        typer.Option(help="Only events of this actor: a key's id, operator, or service."),
    ] = None,
    type_: Annotated[
        str | None,
        typer.Option("--type", help="Only this type: run.failed, or key. for all events of keys."),
    ] = None,
    limit: Annotated[
        int, typer.Option(min=1, max=100_000, help="The number of events: the newest are printed.")
    ] = 100,
    as_json: Json = False,
    home: Home = DEFAULT_HOME,
) -> None:
    """Print the audit log, oldest first: time, actor, event type, run or study, details."""
    with begin_transaction(home) as session:
        study_id = None if study is None else _find_study_id(session, study)
        # The newest `limit` events, printed in the order of time.
        rows = session.scalars(_select_events(study_id, actor, type_).limit(limit)).all()[::-1]
        records = [_make_record(row) for row in rows]
    typer.echo(json.dumps(records) if as_json else "\n".join(map(_format_record, records)))


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
        # `run.` selects every type of runs; without the dot, `run` would be a whole type.
        is_in_group = Event.type.startswith(type_, autoescape=True)
        query = query.where(is_in_group if type_.endswith(".") else Event.type == type_)
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


def _format_record(record: dict[str, Any]) -> str:
    actor, subject = record["actor"] or "unknown", record["run_id"] or record["study_id"] or ""
    at, details = record["at"][:19].replace("T", " "), json.dumps(record["payload"])
    return f"{record['id']}  {at}  {actor}  {record['type']}  {subject}  {details}"
