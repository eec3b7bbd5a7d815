"""`warmscale db` and `warmscale key`: on the database itself, with or without a running service."""

import json
import logging
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast, get_args

import typer

from service.cli_common import Exit, Home, Json, checked_project, fail, print_json, settings
from service.home import DEFAULT
from service.protocol import Scope

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

SCOPES: tuple[str, ...] = get_args(Scope)

db = typer.Typer(help="The database.", no_args_is_help=True)
key = typer.Typer(help="API keys.", no_args_is_help=True)


@db.command()
def upgrade(home: Home = DEFAULT) -> None:
    """Create the tables, or bring them to the newest version. Safe to repeat."""
    from service import db as database  # a second of imports
    from service import migrations

    logging.basicConfig(level=logging.WARNING)
    with reached(), database.database(settings(home)) as url:
        database.use_utc()
        migrations.upgrade(url)
        typer.echo(f"{url.render_as_string(hide_password=True)} is up to date")


@db.command()
def check(
    *,
    files: Annotated[
        bool, typer.Option("--files", help="Read every kept checkpoint; for when nothing trains.")
    ] = False,
    at_rest: Annotated[
        bool, typer.Option("--at-rest", help="Nothing is under way: what is pending is wrong too.")
    ] = False,
    as_json: Json = False,
    home: Home = DEFAULT,
) -> None:
    """Check what must always hold (docs/guarantees.md); 0: it does. Changes nothing."""
    from sqlalchemy import NullPool, create_engine

    from service import invariants
    from service.db import database

    with reached(), database(settings(home)) as url:
        engine = create_engine(url, poolclass=NullPool)
        with invariants.snapshot(engine) as session:
            report = invariants.check(session, at_rest=at_rest, with_files=files)
    typer.echo(json.dumps(asdict(report)) if as_json else invariants.described(report))
    raise typer.Exit(Exit.FAILED if report.violations else Exit.OK)


@key.command()
def create(
    *,
    name: Annotated[str, typer.Argument(help="What the key is for.")],
    scope: Annotated[
        list[str], typer.Option(help=f"{', '.join(SCOPES)}; give it once for each scope.")
    ],
    project: Annotated[
        str | None,
        typer.Option(
            help="The one that it sees. When not given: default; or every one, for a key of "
            "scope admin, or of work or metrics alone."
        ),
    ] = None,
    expires_days: Annotated[int | None, typer.Option(min=1, help="Days until it expires.")] = None,
    home: Home = DEFAULT,
) -> None:
    """Make a key and print it: this is the only time that it is shown."""
    from service import auth  # imports FastAPI

    scopes = _scopes(scope)
    project = checked_project(project)
    expires_at = datetime.now(UTC) + timedelta(days=expires_days) if expires_days else None
    with on_database(home) as session:
        key_id, text = auth.create_key(
            session, name, scopes, project=project, expires_at=expires_at
        )
    typer.echo(f"{key_id}  {name}  {', '.join(scope)}", err=True)
    typer.echo(text)


@key.command(name="list")
def list_(home: Home = DEFAULT, *, as_json: Json = False) -> None:
    """List the keys, newest first: what each may do and where, and when it was last used."""
    from service import auth  # imports FastAPI

    with on_database(home) as session:
        keys = auth.list_keys(session)
    if as_json:
        print_json(keys)
        return
    for view in keys:
        project = view.project or "every project"
        used = f"last used {_minute(view.last_used_at)}" if view.last_used_at else "never used"
        scopes = ", ".join(view.scopes)
        typer.echo(f"{view.id}  {view.name}  {scopes}  {project}  {view.state}  {used}")


def _minute(when: datetime) -> str:
    return f"{when.astimezone(UTC):%Y-%m-%d %H:%M} UTC"


@key.command()
def revoke(
    key_id: Annotated[str, typer.Argument(help="The key's id, key_….")], home: Home = DEFAULT
) -> None:
    """Revoke a key for good."""
    from service import auth  # imports FastAPI

    with on_database(home) as session:
        revoked = auth.revoke_key(session, key_id)
    if not revoked:
        fail(Exit.CONFLICT, f"there is no key {key_id!r} that is still good")
    typer.echo(f"{key_id} is revoked")


def _scopes(given: list[str]) -> list[Scope]:
    for scope in given:
        if scope not in SCOPES:
            fail(Exit.USAGE, f"--scope: choose from {', '.join(SCOPES)} (got {scope!r})")
    return cast("list[Scope]", given)


@contextmanager
def on_database(home: Path) -> Generator["Session"]:
    """One transaction on the database, embedded or not."""
    from sqlalchemy import NullPool, create_engine
    from sqlalchemy.orm import Session

    from service.db import database

    with reached(), database(settings(home)) as url:
        engine = create_engine(url, poolclass=NullPool)
        with Session(engine) as session, session.begin():
            yield session


@contextmanager
def reached() -> Generator[None]:
    """Say shortly that a database cannot be reached, or is not as this version needs it."""
    from sqlalchemy.exc import OperationalError, ProgrammingError

    from service.migrations import LockBusyError
    from service.revisions import NewerDatabaseError

    try:
        yield
    except OperationalError as error:
        fail(Exit.UNREACHABLE, f"cannot reach the database: {str(error.orig).strip()}")
    except ProgrammingError as error:
        works = "run `warmscale db upgrade` first"
        fail(Exit.CONFLICT, f"{str(error.orig).splitlines()[0]}; {works}")
    except (LockBusyError, NewerDatabaseError) as error:
        fail(Exit.CONFLICT, str(error))
    except ValueError as error:
        fail(Exit.USAGE, str(error))
