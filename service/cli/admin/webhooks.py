"""`warmscale webhook`: on the database itself, with or without a running service."""

import asyncio
from typing import Annotated

import typer

from service.cli.admin.session import begin_transaction
from service.cli.common import Exit, Home, Json, check_project, fail, load_settings, print_json
from service.local_stack.home import DEFAULT_HOME

webhook = typer.Typer(
    help="Tell other programs when a study or a run has ended.", no_args_is_help=True
)
Id = Annotated[str, typer.Argument(metavar="ID", help="The webhook's id, wh_….")]


@webhook.command()
def add(
    url: Annotated[str, typer.Argument(help="http:// or https://.")],
    *,
    events: Annotated[
        str, typer.Option(help="Types of events, with commas between; all by default.")
    ] = "",
    project: Annotated[
        str | None, typer.Option(help="Only its studies'; every project's when not given.")
    ] = None,
    home: Home = DEFAULT_HOME,
) -> None:
    """Add a webhook and print its secret: this is the only time that it is shown."""
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
    typer.echo(f"{webhook_id}  {url}  {', '.join(types)}", err=True)
    typer.echo(secret)


@webhook.command(name="list")
def list_webhooks(home: Home = DEFAULT_HOME, *, as_json: Json = False) -> None:
    """List webhooks: what waits, what was delivered in the last week, what was given up."""
    from service.webhooks import store

    with begin_transaction(home) as session:
        found = store.list_webhooks(session)
    if as_json:
        print_json(found)
        return
    for one in found:
        counts = f"waiting {one.waiting}, delivered {one.delivered}, dead {one.dead}"
        where = one.project or "every project"
        typer.echo(f"{one.id}  {one.url}  {', '.join(one.events)}  {where}  {counts}")
        if one.last_error:
            typer.echo(f"  last failure: {one.last_error}")


@webhook.command()
def remove(webhook_id: Id, home: Home = DEFAULT_HOME) -> None:
    """Remove a webhook, and what waits for it."""
    from service.webhooks import store

    with begin_transaction(home) as session:
        removed = store.remove_webhook(session, webhook_id)
    if not removed:
        fail(Exit.CONFLICT, f"there is no webhook {webhook_id!r}")
    typer.echo(f"{webhook_id} is removed")


@webhook.command()
def retry(webhook_id: Id, home: Home = DEFAULT_HOME) -> None:
    """Try anew what was given up."""
    from service.webhooks import store

    with begin_transaction(home) as session:
        revived = store.revive_deliveries(session, webhook_id)
    typer.echo(f"{revived} deliveries wait again")


@webhook.command(name="test")
def send_test_event(webhook_id: Id, home: Home = DEFAULT_HOME) -> None:
    """Send a signed message of type `webhook.test` from here, now, once."""
    from service.database.tables import Webhook

    with begin_transaction(home) as session:
        row = session.get(Webhook, webhook_id)
        if row is None:
            fail(Exit.CONFLICT, f"there is no webhook {webhook_id!r}")
        url, secret = row.url, row.secret
    error = asyncio.run(
        _send_test(url, secret, allow_private=load_settings(home).webhook_allow_private)
    )
    if error is not None:
        fail(Exit.FAILED, f"{url}: {error}")
    typer.echo(f"{url} took it")


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
