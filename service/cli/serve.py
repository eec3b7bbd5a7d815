"""`warmscale serve`: the API in this process."""

import logging
import os
import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import uvicorn
from sqlalchemy import create_engine
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.engine import URL
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from service.cli.common import Exit, fail
from service.database.engine import open_database, use_utc, wait_until_reachable
from service.database.tables import ApiKey
from service.local_stack.child_process import die_with_parent
from service.observability import logs, tracing
from service.operations.migrations import LockBusyError, read_revisions, upgrade_database
from service.operations.revisions import NewerDatabaseError, describe_mismatch
from service.optuna_bridge.installed_optuna import UnknownOptunaError
from service.settings import Settings
from service.web.services import find_service
from service.web.shutdown import Server, Shutdown, end_on_sigterm
from warmcore.storage.backoff import every, retry

if TYPE_CHECKING:
    from fastapi import FastAPI


_DATABASE_PATIENCE_SECONDS = 60.0
_START_PAUSES = every(0.5)
_log = logging.getLogger(__name__)
# The supervisor kills the API after 15 s, and Kubernetes after 30 s.
_GRACEFUL_SECONDS = 10


def run_api(settings: Settings, *, supervised: bool) -> None:
    """Run the API in this process until a signal stops it.

    An API under a supervisor or with the embedded database upgrades its database at the start.
    """
    end_on_sigterm()
    use_utc()
    # Before any upgrade: Optuna's migration disables all loggers if the root logger has no handler.
    logs.configure_logging(settings.log_format)
    if not settings.is_loopback:
        _log.warning(
            "plain HTTP: others on the network can read the keys; put a proxy with TLS in front",
            extra={"host": settings.host},
        )
    if supervised:
        die_with_parent()
    with send_traces(), open_database(settings) as url:
        app = _make_application(settings, url, supervised=supervised)
        config = uvicorn.Config(
            app,
            host=settings.host,
            port=settings.port,
            log_config=None,
            server_header=False,
            access_log=False,  # `service.web.request_log` writes the line
            timeout_graceful_shutdown=_GRACEFUL_SECONDS,
        )
        Server(config, find_service(app, Shutdown)).run()


def _make_application(settings: Settings, url: URL, *, supervised: bool) -> "FastAPI":
    """Return the API on its prepared database; retry for 60 s while the database is away."""
    try:
        from service.app import create_app  # a second of imports
        from service.optuna_bridge.sampler import TRANSIENT
    except UnknownOptunaError as error:
        fail(Exit.CONFLICT, str(error))

    # PostgreSQL can restart between two statements of the start, for example in a failover.
    deadline = time.monotonic() + _DATABASE_PATIENCE_SECONDS

    def start() -> "FastAPI":
        _prepare_database(url, upgraded=supervised or settings.database_url is None)
        if supervised:
            admit_keys(url, os.environ["WARMSCALE_API_KEY"], os.environ["WARMSCALE_FLEET_KEY"])
        return create_app(settings, url)

    def log_failure(error: Exception) -> None:
        _log.warning(
            "the database went away during the start", extra={"error": _describe_error(error)}
        )

    try:
        return retry(
            start, _START_PAUSES, on=TRANSIENT, deadline=deadline, before_pause=log_failure
        )
    except TRANSIENT as error:
        fail(Exit.UNREACHABLE, f"cannot reach the database: {_describe_error(error)}")


def _describe_error(error: Exception) -> str:
    """Return the driver's message where SQLAlchemy wrapped it."""
    return str(getattr(error, "orig", None) or error).strip()


@contextmanager
def send_traces() -> Generator[None]:
    """Export traces during the block, if the environment asks for traces.

    Exits with code 2 if the packages for traces are missing.
    """
    try:
        with tracing.export_traces(os.environ):
            yield
    except tracing.TracesMissingError as error:
        fail(Exit.USAGE, str(error))


def _prepare_database(url: URL, *, upgraded: bool) -> None:
    """Upgrade the database if `upgraded`, and exit unless it has this version's revisions."""
    # Without this check, the API would start on old tables and fail later, in single requests.
    try:
        wait_until_reachable(url, _DATABASE_PATIENCE_SECONDS)
    except OperationalError as error:
        fail(Exit.UNREACHABLE, f"cannot reach the database: {str(error.orig).strip()}")
    try:
        if upgraded:
            upgrade_database(url)
        with create_engine(url, poolclass=NullPool).connect() as connection:
            wrong = describe_mismatch(read_revisions(connection))
    except (LockBusyError, NewerDatabaseError, UnknownOptunaError) as error:
        fail(Exit.CONFLICT, str(error))
    if wrong is not None:
        fail(Exit.CONFLICT, wrong)


def admit_keys(url: URL, key: str, fleet_key: str) -> None:
    """Add the supervisor's key and its fleet's key to the database, unless they are there.

    Raises:
        SystemExit: the supervisor's key was revoked.
    """
    from service.access import keys  # imports FastAPI

    rows = [
        {"name": "warmscale up", "hash": keys.hash_key(key), "scopes": ["admin"]},
        {"name": "fleet of warmscale up", "hash": keys.hash_key(fleet_key), "scopes": ["work"]},
    ]
    engine = create_engine(url, poolclass=NullPool)
    with Session(engine) as session, session.begin():
        session.execute(insert(ApiKey).values(rows).on_conflict_do_nothing())
        caller = keys.find_caller(session, key)
    # The insert left an existing key as it was: a revoked key stays revoked at the next start.
    if caller is None:
        raise SystemExit("the key in client.json was revoked; delete that file to get a new key")
