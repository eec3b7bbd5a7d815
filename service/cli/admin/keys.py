"""`warmscale key`: API keys, on the database itself, with or without a running service."""

from datetime import UTC, datetime, timedelta
from typing import Annotated, cast, get_args

import typer

from service.cli.admin.session import begin_transaction
from service.cli.common import Exit, Home, Json, check_project, fail, print_json
from service.local_stack.home import DEFAULT_HOME
from service.protocol import Scope

SCOPES: tuple[str, ...] = get_args(Scope)

key = typer.Typer(help="API keys.", no_args_is_help=True)


@key.command()
def create(
    *,
    name: Annotated[str, typer.Argument(help="The purpose of the key.")],
    scope: Annotated[
        list[str], typer.Option(help=f"{', '.join(SCOPES)}; give it once for each scope.")
    ],
    project: Annotated[
        str | None,
        typer.Option(
            help="The project that the key sees. By default: the project `default`; every project "
            "for a key of scope admin, or of work or metrics alone."
        ),
    ] = None,
    expires_days: Annotated[int | None, typer.Option(min=1, help="Days until it expires.")] = None,
    home: Home = DEFAULT_HOME,
) -> None:
    """Make a key and print it; no later command shows the key again."""
    from service.access import keys  # imports SQLAlchemy, which takes long

    scopes = _check_scopes(scope)
    project = check_project(project)
    expires_at = datetime.now(UTC) + timedelta(days=expires_days) if expires_days else None
    with begin_transaction(home) as session:
        key_id, text = keys.create_key(
            session, name, scopes, project=project, expires_at=expires_at
        )
    # The key alone goes to stdout: `export WARMSCALE_API_KEY=$(warmscale key create …)` works.
    typer.echo(f"{key_id}  {name}  {', '.join(scope)}", err=True)
    typer.echo(text)


@key.command(name="list")
def list_keys(home: Home = DEFAULT_HOME, *, as_json: Json = False) -> None:
    """List the keys, newest first: scopes, project, state and last use."""
    from service.access import keys

    with begin_transaction(home) as session:
        views = keys.list_keys(session)
    if as_json:
        print_json(views)
        return
    # A key's text is not stored, only its hash: the list identifies keys by id and name.
    for view in views:
        project = view.project or "every project"
        used = (
            f"last used {_format_minute(view.last_used_at)}" if view.last_used_at else "never used"
        )
        scopes = ", ".join(view.scopes)
        typer.echo(f"{view.id}  {view.name}  {scopes}  {project}  {view.state}  {used}")


def _format_minute(when: datetime) -> str:
    return f"{when.astimezone(UTC):%Y-%m-%d %H:%M} UTC"


@key.command()
def revoke(
    key_id: Annotated[str, typer.Argument(help="The key's id, key_….")], home: Home = DEFAULT_HOME
) -> None:
    """Revoke a key for good."""
    from service.access import keys

    with begin_transaction(home) as session:
        revoked = keys.revoke_key(session, key_id)
    if not revoked:
        fail(Exit.CONFLICT, f"there is no valid key {key_id!r}")
    typer.echo(f"{key_id} is revoked")


def _check_scopes(given: list[str]) -> list[Scope]:
    for scope in given:
        if scope not in SCOPES:
            fail(Exit.USAGE, f"--scope: choose from {', '.join(SCOPES)} (got {scope!r})")
    return cast("list[Scope]", given)
