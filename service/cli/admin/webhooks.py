"""`warmscale webhook`: webhooks, on the database itself, with or without a running service."""

import asyncio
from typing import Annotated

import typer

from service.cli.admin.session import begin_transaction
from service.cli.common import Exit, Home, Json, check_project, fail, load_settings, print_json
from service.local_stack.home import DEFAULT_HOME

webhook = typer.Typer(
    help="Notify other programs when a study or a run has ended.", no_args_is_help=True
)
Id = Annotated[str, typer.Argument(metavar="ID", help="The webhook's id, wh_….")]


@webhook.command()
def add(
    url: Annotated[str, typer.Argument(help="An address, http:// or https://.")],
    *,
    events: Annotated[
        str, typer.Option(help="Event types, separated by commas; all by default.")
    ] = "",
    project: Annotated[
        str | None, typer.Option(help="Only this project's events; all projects by default.")
    ] = None,
    home: Home = DEFAULT_HOME,
) -> None:
    """Add a webhook and print its secret; no later command shows the secret again."""
    from service.events.audit_log import NOTIFIED
    from service.webhooks import addresses, store

    types = [name.strip() for name in events.split(",") if name.strip()] or sorted(NOTIFIED)
    if unknown := [name for name in types if name not in NOTIFIED]:
        fail(Exit.USAGE, f"--events: no {unknown[0]!r}; there are {', '.join(sorted(NOTIFIED))}")
    project = check_project(project)
    try:
        addresses.parse_url(url)
    except addresses.ForbiddenURLError as error:
        fail(Exit.USAGE, str(error))
    with begin_transaction(home) as session:
        row, secret = store.add_webhook(session, url, types, project)
        webhook_id = row.id
    # The secret alone goes to stdout, for scripts.
    typer.echo(f"{webhook_id}  {url}  {', '.join(types)}", err=True)
    typer.echo(secret)


@webhook.command(name="list")
def list_webhooks(home: Home = DEFAULT_HOME, *, as_json: Json = False) -> None:
    """List webhooks with their deliveries: waiting, delivered in the last week, given up."""
    from service.webhooks import store

    with begin_transaction(home) as session:
        views = store.list_webhooks(session)
    if as_json:
        print_json(views)
        return
    for view in views:
        counts = f"waiting {view.waiting}, delivered {view.delivered}, dead {view.dead}"
        project = view.project or "every project"
        typer.echo(f"{view.id}  {view.url}  {', '.join(view.events)}  {project}  {counts}")
        if view.last_error:
            typer.echo(f"  last failure: {view.last_error}")


@webhook.command()
def remove(webhook_id: Id, home: Home = DEFAULT_HOME) -> None:
    """Remove a webhook and its waiting deliveries."""
    from service.webhooks import store

    with begin_transaction(home) as session:
        removed = store.remove_webhook(session, webhook_id)
    if not removed:
        fail(Exit.CONFLICT, f"there is no webhook {webhook_id!r}")
    typer.echo(f"{webhook_id} is removed")


@webhook.command()
def retry(webhook_id: Id, home: Home = DEFAULT_HOME) -> None:
    """Try again to send the deliveries that were given up."""
    from service.webhooks import store

    with begin_transaction(home) as session:
        revived = store.revive_deliveries(session, webhook_id)
    typer.echo(f"{revived} deliveries wait again")


@webhook.command(name="test")
def send_test_event(webhook_id: Id, home: Home = DEFAULT_HOME) -> None:
    """Send a signed message of type `webhook.test` from this machine, once."""
    from service.database.tables import Webhook

    with begin_transaction(home) as session:
        row = session.get(Webhook, webhook_id)
        if row is None:
            fail(Exit.CONFLICT, f"there is no webhook {webhook_id!r}")
        # Copy the fields: the row is unusable after the session.
        url, secret = row.url, row.secret
    error = asyncio.run(
        _send_test(url, secret, allow_private=load_settings(home).webhook_allow_private)
    )
    if error is not None:
        fail(Exit.FAILED, f"{url}: {error}")
    typer.echo(f"{url} accepted it")


async def _send_test(url: str, secret: str, *, allow_private: bool) -> str | None:
    from datetime import UTC, datetime
    from secrets import token_hex

    from service.webhooks import sending

    now = datetime.now(UTC).isoformat()
    body = sending.encode_body({"type": "webhook.test", "timestamp": now, "data": {}})
    async with sending.make_client() as http:
        return await sending.send_message(
            http,
            url,
            secret=secret,
            message_id=f"msg_test_{token_hex(8)}",
            body=body,
            allow_private=allow_private,
        )
