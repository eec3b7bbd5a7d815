"""`warmscale checkpoints gc`: on the database and the artifacts themselves."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.cli.admin.session import exit_on_database_errors
from service.cli.common import Exit, Home, Json, fail, load_settings
from service.local_stack.home import DEFAULT_HOME

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from service.operations.checkpoint_cleanup.collect import CleanupOptions, CleanupResult

checkpoints = typer.Typer(help="Checkpoints.", no_args_is_help=True)


@checkpoints.callback()
def _keep_group() -> None:
    """Checkpoints."""


@checkpoints.command()
def gc(
    *,
    study: Annotated[str | None, typer.Option(help="Its id or name; all when not given.")] = None,
    project: Annotated[str | None, typer.Option(help="All projects when not given.")] = None,
    older_than_days: Annotated[
        float, typer.Option(min=0, help="Younger ones are kept; no less than backups are apart.")
    ] = 7.0,
    orphans_older_than_hours: Annotated[
        float, typer.Option(min=1, help="For folders that were never published.")
    ] = 24.0,
    delete: Annotated[
        bool, typer.Option("--delete", help="Delete; without it, only say what would be.")
    ] = False,
    home: Home = DEFAULT_HOME,
    as_json: Json = False,
) -> None:
    """Say, or delete, which checkpoints no run can need any more, and why the others are kept."""
    from service.operations.checkpoint_cleanup.collect import CleanupOptions

    options = CleanupOptions(
        older_than_days=older_than_days,
        orphans_older_than_hours=orphans_older_than_hours,
        delete=delete,
    )
    found = _collect_checkpoints(home, study, project, options)
    if as_json:
        typer.echo(json.dumps([_make_record(one) for one in found]))
    else:
        _print_results(found, options)
    if any(one.skipped for one in found):
        raise typer.Exit(Exit.FAILED)


def _collect_checkpoints(
    home: Path, study: str | None, project: str | None, options: "CleanupOptions"
) -> "list[CleanupResult]":
    from sqlalchemy import NullPool, create_engine
    from sqlalchemy.orm import sessionmaker

    from service.database import engine
    from service.operations.checkpoint_cleanup.collect import collect_checkpoints

    chosen = load_settings(home)
    with exit_on_database_errors(), engine.open_database(chosen) as url:
        sessions = sessionmaker(create_engine(url, poolclass=NullPool), expire_on_commit=False)
        with sessions() as session:
            ids = _choose_studies(session, study, project)
        return [collect_checkpoints(sessions, one, chosen.artifact_root, options) for one in ids]


def _choose_studies(session: "Session", study: str | None, project: str | None) -> list[str]:
    """Ids of the studies to look at: a name says one of them, or nothing is done."""
    from sqlalchemy import select

    from service.access.caller import Caller
    from service.access.lookup import find_study
    from service.database.tables import Study
    from service.problems import Problem

    operator = Caller(key_id="", scopes=frozenset(), project=project)
    if study is None:
        query = select(Study.id).where(operator.study_filter).order_by(Study.created_at)
        return list(session.scalars(query))
    try:
        return [find_study(session, operator, study).id]
    except Problem as problem:
        fail(Exit.CONFLICT, problem.detail.replace("?project=", "--project"))


def _make_record(one: "CleanupResult") -> dict[str, Any]:
    rows = [
        {"uri": d.fact.uri, "bytes": d.fact.num_bytes, "keep": d.keep, "reason": d.reason}
        for d in one.decisions
    ]
    rows += [
        {
            "uri": r.folder.uri,
            "bytes": r.folder.num_bytes,
            "keep": not r.delete,
            "reason": r.reason,
        }
        for r in one.unpublished
    ]
    return {"study": one.study_id, "bytes": one.num_bytes, "folders": rows, "left": one.skipped}


def _print_results(found: "list[CleanupResult]", options: "CleanupOptions") -> None:
    verb = "deleted" if options.delete else "would delete"
    for one in found:
        for row in _make_record(one)["folders"]:
            did = "keep" if row["keep"] else verb
            typer.echo(f"{did:12}  {row['bytes']:>14,}  {row['uri']}  ({row['reason']})")
        for line in one.skipped:
            typer.echo(f"left alone: {line}", err=True)
    total = sum(one.num_bytes for one in found)
    typer.echo(f"{verb} {total:,} bytes" + ("" if options.delete else "; say --delete to do so"))
