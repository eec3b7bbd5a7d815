"""`warmscale db`: upgrade, check, current, history, downgrade, backup and restore."""

import json
import logging
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.cli.admin.session import exit_on_database_errors
from service.cli.common import Exit, Home, Json, fail, load_settings
from service.local_stack.home import DEFAULT_HOME

if TYPE_CHECKING:
    from sqlalchemy.engine import URL

    from service.operations.backup.archive import BackupManifest

BackupFile = Annotated[Path, typer.Argument(metavar="FILE", help="The backup's file.")]


@contextmanager
def _open_database(home: Path) -> Generator["URL"]:
    from service.database import engine as db
    from service.operations.backup.archive import BackupError
    from service.operations.backup.load import InUseError, NotEmptyError

    try:
        with exit_on_database_errors(), db.open_database(load_settings(home)) as url:
            # Optuna's tables hold times without a zone.
            db.use_utc()
            yield url
    except (BackupError, InUseError, NotEmptyError) as error:
        fail(Exit.CONFLICT, str(error))


def current(*, home: Home = DEFAULT_HOME, as_json: Json = False) -> None:
    """Print the revision of both schemas; exit with code 4 if a revision is not this version's."""
    from sqlalchemy import create_engine
    from sqlalchemy.pool import NullPool

    from service.operations.migrations import read_revisions
    from service.operations.revisions import describe_mismatch

    with _open_database(home) as url:
        engine = create_engine(url, poolclass=NullPool)
        with engine.connect() as connection:
            found = read_revisions(connection)
    if as_json:
        typer.echo(
            json.dumps(
                {r.schema: {"found": r.found, "head": r.head, "is": r.status} for r in found}
            )
        )
    else:
        typer.echo("\n".join(map(str, found)))
    if (wrong := describe_mismatch(found)) is not None:
        fail(Exit.CONFLICT, wrong)


def history() -> None:
    """Print the revisions of this version, oldest first."""
    from service.operations.migrations import list_scripts

    for script in list_scripts():
        typer.echo(f"{script.revision}  {(script.doc or '').splitlines()[0]}")


def downgrade(
    *,
    to: Annotated[str, typer.Option(help="The earlier revision, as `db history` names it.")],
    yes: Annotated[
        bool, typer.Option("--yes", help="Delete the data that the command lists.")
    ] = False,
    home: Home = DEFAULT_HOME,
) -> None:
    """Downgrade our tables to an earlier revision, for an earlier version of warmscale."""
    from sqlalchemy import create_engine
    from sqlalchemy.pool import NullPool

    from service.database.tables import SCHEMA
    from service.operations import migrations
    from service.operations.revisions import read_revision

    with _open_database(home) as url:
        engine = create_engine(url, poolclass=NullPool)
        with engine.connect() as connection:
            steps = migrations.list_lost_data(read_revision(connection, SCHEMA), to)
        # Print the losses before the question of --yes: the user must see them to decide.
        for revision, lost in steps:
            typer.echo(f"undo {revision}: {lost}", err=True)
        if not yes:
            fail(Exit.USAGE, "make a backup (`warmscale db backup`), then say --yes")
        migrations.downgrade_database(url, to)
    typer.echo(f"schema {SCHEMA} is at {to}")


def backup(path: BackupFile, *, home: Home = DEFAULT_HOME, as_json: Json = False) -> None:
    """Write a snapshot of both schemas to a file that only you can read.

    The service may run meanwhile. The file holds the hashes of API keys, and no checkpoints' files.
    """
    from service.operations.backup.dump import write_backup as write

    with _open_database(home) as url, _show_progress(as_json=as_json) as progress:
        manifest = write(url, path, progress)
    _print_manifest("backed up to", path, manifest, as_json=as_json)


def restore(
    path: BackupFile,
    *,
    replace: Annotated[
        bool, typer.Option("--replace", help="Delete the present content of the database.")
    ] = False,
    home: Home = DEFAULT_HOME,
    as_json: Json = False,
) -> None:
    """Restore a backup into an empty database, in one transaction; stop the service first.

    A backup of an earlier version is upgraded. API keys of the backup are valid again; newer keys
    are gone.
    """
    from service.operations.backup.load import restore_backup as read

    with _open_database(home) as url, _show_progress(as_json=as_json) as progress:
        manifest = read(url, path, progress, replace=replace)
    _print_manifest("restored from", path, manifest, as_json=as_json)
    typer.echo(
        "keys that were revoked since the backup are good again: see `warmscale key list`", err=True
    )


@contextmanager
def _show_progress(*, as_json: bool) -> Generator[Callable[[str, int], None]]:
    """Show a progress bar for each table on stderr; yields a function that adds bytes."""
    from rich.console import Console
    from rich.progress import DownloadColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), DownloadColumn(), TimeElapsedColumn())
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=Console(stderr=True), disable=as_json) as bar:

        def add_bytes(name: str, num_bytes: int) -> None:
            if name not in tasks:
                tasks[name] = bar.add_task(name, total=None)
            bar.advance(tasks[name], num_bytes)

        yield add_bytes


def _print_manifest(done: str, path: Path, manifest: "BackupManifest", *, as_json: bool) -> None:
    fields: dict[str, Any] = {
        "file": str(path),
        "made_at": manifest.made_at.isoformat(),
        "rows": manifest.num_rows,
        "file_bytes": path.stat().st_size,
        "revisions": manifest.revisions,
    }
    if as_json:
        typer.echo(json.dumps(fields))
        return
    # Example: `backed up to a.backup: 120 rows (4096 bytes) of 2026-01-01 12:00:00 UTC, at
    # warmscale 0006, optuna v3.2.0.a`.
    at = ", ".join(f"{schema} {revision}" for schema, revision in manifest.revisions.items())
    typer.echo(
        f"{done} {path}: {manifest.num_rows} rows ({path.stat().st_size} bytes) of "
        f"{manifest.made_at:%Y-%m-%d %H:%M:%S} UTC, at {at}"
    )


db = typer.Typer(help="The database.", no_args_is_help=True)


@db.command()
def upgrade(home: Home = DEFAULT_HOME) -> None:
    """Create the tables, or bring them to the newest version. Safe to repeat."""
    from service.database import engine
    from service.operations import migrations

    # Optuna's migration disables all loggers if the root logger has no handler.
    logging.basicConfig(level=logging.WARNING)
    with exit_on_database_errors(), engine.open_database(load_settings(home)) as url:
        engine.use_utc()
        migrations.upgrade_database(url)
        typer.echo(f"{url.render_as_string(hide_password=True)} is up to date")


@db.command()
def check(
    *,
    files: Annotated[
        bool,
        typer.Option("--files", help="Read every kept checkpoint; use it when nothing trains."),
    ] = False,
    at_rest: Annotated[
        bool,
        typer.Option(
            "--at-rest", help="Count pending repairs as violations; use it when nothing runs."
        ),
    ] = False,
    as_json: Json = False,
    home: Home = DEFAULT_HOME,
) -> None:
    """Check the guarantees of docs/guarantees.md, without changes; exit with 0 if they hold."""
    from sqlalchemy import NullPool, create_engine

    from service.database.engine import open_database
    from service.operations import invariants

    with exit_on_database_errors(), open_database(load_settings(home)) as url:
        # A snapshot: the service may write while the check reads.
        engine = create_engine(url, poolclass=NullPool)
        with invariants.open_snapshot(engine) as session:
            report = invariants.check_database(session, at_rest=at_rest, with_files=files)
    typer.echo(json.dumps(asdict(report)) if as_json else invariants.format_report(report))
    raise typer.Exit(Exit.FAILED if report.violations else Exit.OK)
