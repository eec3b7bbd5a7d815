"""`warmscale checkpoints gc`: deletion of checkpoints, on the database and the artifact store."""

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
    # typer turns a group with a single command into that command; a callback keeps it a group.


@checkpoints.command()
def gc(
    *,
    study: Annotated[
        str | None, typer.Option(help="A study's id or name; all studies by default.")
    ] = None,
    project: Annotated[str | None, typer.Option(help="A project; all projects by default.")] = None,
    older_than_days: Annotated[
        float,
        typer.Option(
            min=0, help="Keep younger checkpoints; choose at least the days between backups."
        ),
    ] = 7.0,
    orphans_older_than_hours: Annotated[
        float, typer.Option(min=1, help="Keep younger folders that were never published.")
    ] = 24.0,
    delete: Annotated[
        bool, typer.Option("--delete", help="Delete; without this option, only print the choice.")
    ] = False,
    home: Home = DEFAULT_HOME,
    as_json: Json = False,
) -> None:
    """Print or delete the checkpoints that no run can need, and print why the others are kept."""
    from service.operations.checkpoint_cleanup.collect import CleanupOptions

    options = CleanupOptions(
        older_than_days=older_than_days,
        orphans_older_than_hours=orphans_older_than_hours,
        delete=delete,
    )
    results = _collect_checkpoints(home, study, project, options)
    if as_json:
        typer.echo(json.dumps([_make_record(result) for result in results]))
    else:
        _print_results(results, options)
    if any(result.skipped for result in results):
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
        # A transaction for each study: a long clean-up must not hold locks of all studies.
        return [collect_checkpoints(sessions, id_, chosen.artifact_root, options) for id_ in ids]


def _choose_studies(session: "Session", study: str | None, project: str | None) -> list[str]:
    """Return the ids of the chosen studies; exit with code 4 if a name fits no study or several."""
    from sqlalchemy import select

    from service.access.caller import Caller
    from service.access.lookup import find_study
    from service.database.tables import Study
    from service.problems import Problem

    # The operator of the database sees every project, or the project of --project.
    operator = Caller(key_id="", scopes=frozenset(), project=project)
    if study is None:
        query = select(Study.id).where(operator.study_filter).order_by(Study.created_at)
        return list(session.scalars(query))
    try:
        return [find_study(session, operator, study).id]
    except Problem as problem:
        fail(Exit.CONFLICT, problem.detail.replace("?project=", "--project"))


def _make_record(result: "CleanupResult") -> dict[str, Any]:
    rows = [
        {"uri": d.fact.uri, "bytes": d.fact.num_bytes, "keep": d.keep, "reason": d.reason}
        for d in result.decisions
    ]
    # Folders without a row in the database: a worker has written them and not published them.
    rows += [
        {
            "uri": r.folder.uri,
            "bytes": r.folder.num_bytes,
            "keep": not r.delete,
            "reason": r.reason,
        }
        for r in result.unpublished
    ]
    return {
        "study": result.study_id,
        "bytes": result.num_bytes,
        "folders": rows,
        "left": result.skipped,
    }


def _print_results(results: "list[CleanupResult]", options: "CleanupOptions") -> None:
    verb = "deleted" if options.delete else "would delete"
    for result in results:
        for row in _make_record(result)["folders"]:
            action = "keep" if row["keep"] else verb
            typer.echo(f"{action:12}  {row['bytes']:>14,}  {row['uri']}  ({row['reason']})")
        for line in result.skipped:
            typer.echo(f"skipped: {line}", err=True)
    total = sum(result.num_bytes for result in results)
    typer.echo(f"{verb} {total:,} bytes" + ("" if options.delete else "; say --delete to do so"))
