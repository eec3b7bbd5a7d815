"""Upgrades and downgrades of both schemas: ours by our migrations, Optuna's by its own."""

import itertools
import logging
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from inspect import getdoc
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.script import Script, ScriptDirectory
from psycopg.errors import LockNotAvailable
from sqlalchemy import Connection, Engine, create_engine, text
from sqlalchemy.engine import URL
from sqlalchemy.exc import OperationalError
from sqlalchemy.pool import NullPool

from service.database.engine import optuna_url
from service.database.tables import OPTUNA_SCHEMA, SCHEMA
from service.operations.revisions import Revision, check_not_newer, read_revision
from warmcore.storage.backoff import every, retry

# Any constant would do. Every process that changes, copies or replaces tables takes this lock.
_UPGRADE_LOCK = 0x7761726D
_log = logging.getLogger(__name__)


# PostgreSQL's lock queue is in order. A migration that waits for its lock on `runs` therefore makes
# every later query of `runs` wait behind it, although those queries would not disturb each other.
# For example a report that takes 60 s would stop all leases for 60 s. Hence a migration waits 3 s,
# gives up, lets the queries through for 2 s, and tries again: 20 times, about 100 s.
@dataclass(frozen=True, kw_only=True)
class Patience:
    """The patience of a migration: seconds per wait for a lock, number of waits, and the pause."""

    lock_seconds: float = 3.0
    attempts: int = 20
    pause_seconds: float = 2.0


class LockBusyError(Exception):
    """A table that a transaction kept locked for longer than a migration may wait."""


def alembic_config(url: URL, *, lock_seconds: float | None = None) -> Config:
    """Return Alembic's configuration, wherever the package is installed."""
    config = _scripts_config()
    config.attributes["url"] = url
    config.attributes["lock_seconds"] = lock_seconds
    return config


def config_for_connection(connection: Connection) -> Config:
    """Return Alembic's configuration for a transaction that is open already."""
    config = _scripts_config()
    config.attributes["connection"] = connection
    return config


def _scripts_config() -> Config:
    # In the repository `alembic/` is beside `service/`; a wheel has it inside `service/`.
    service = Path(__file__).resolve().parents[1]
    beside, inside = service.parent / "alembic", service / "alembic"
    folder = beside if (beside / "env.py").exists() else inside
    config = Config()
    config.set_main_option("script_location", str(folder).replace("%", "%%"))
    return config


@cache
def list_scripts() -> tuple[Script, ...]:
    """Return our migrations, oldest first."""
    return tuple(ScriptDirectory.from_config(_scripts_config()).walk_revisions())[::-1]


@cache
def known_revisions() -> dict[str, tuple[str, ...]]:
    """Return the revisions of each schema that this program knows, oldest first."""
    from service.optuna_bridge import schema as optuna_schema  # noqa: PLC0415 - optuna takes a second to import

    optuna_schema.check_installed_optuna()
    ours = tuple(script.revision for script in list_scripts())
    return {SCHEMA: ours, OPTUNA_SCHEMA: optuna_schema.list_revisions()}


def read_revisions(connection: Connection) -> tuple[Revision, ...]:
    """Return the revision of both schemas of a database."""
    return tuple(
        Revision(schema=schema, found=read_revision(connection, schema), known=known)
        for schema, known in known_revisions().items()
    )


def upgrade_database(url: URL, patience: Patience = Patience()) -> None:
    """Bring our schema and Optuna's to the newest version; many processes may call it at once.

    Raises:
        NewerDatabaseError: a later version has upgraded the database.
        UnknownOptunaError: the installed Optuna's tables are not the known ones.
        LockBusyError: a transaction held a table for too long; nothing was changed.
    """
    from service.optuna_bridge import schema as optuna_schema  # noqa: PLC0415 - optuna takes a second to import

    known_revisions()  # refuses an unknown Optuna before the first statement
    config = alembic_config(url, lock_seconds=patience.lock_seconds)
    theirs = optuna_url(_with_lock_timeout(url, patience.lock_seconds))
    with hold_tables(url) as connection:
        for schema in (SCHEMA, OPTUNA_SCHEMA):
            connection.execute(text(f"CREATE SCHEMA IF NOT EXISTS {schema}"))
        check_not_newer(read_revisions(connection))
        _retry_while_locked(connection, patience, lambda: command.upgrade(config, "head"))
        _retry_while_locked(connection, patience, lambda: optuna_schema.upgrade_tables(theirs))


def downgrade_database(url: URL, revision: str, patience: Patience = Patience()) -> None:
    """Take our schema down to an earlier revision.

    Raises:
        NewerDatabaseError: a later version has upgraded the database.
        LockBusyError: a transaction held a table for too long; nothing was changed.
    """
    config = alembic_config(url, lock_seconds=patience.lock_seconds)
    with hold_tables(url) as connection:
        check_not_newer(read_revisions(connection))
        _retry_while_locked(connection, patience, lambda: command.downgrade(config, revision))


def list_lost_data(current: str | None, to: str) -> list[tuple[str, str]]:
    """Return the data that each step down from revision `current` to `to` loses, newest first.

    Each entry is a revision and the docstring of its downgrade.

    Raises:
        ValueError: `to` is not an earlier revision.
    """
    names = [script.revision for script in list_scripts()]
    earlier = names[: names.index(current)] if current in names else []
    if to not in earlier:
        works = ", ".join(earlier) or "none"
        raise ValueError(f"--to: the database is at {current}; below it is {works} (got {to!r})")
    above = list_scripts()[names.index(to) + 1 : len(earlier) + 1]
    return [(script.revision, getdoc(script.module.downgrade) or "") for script in reversed(above)]


@contextmanager
def hold_tables(url: URL, *, shared: bool = False) -> Generator[Connection]:
    """Keep every other migration and restore waiting; with `shared`, let other backups in."""
    engine = create_engine(url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
    mode = "_shared" if shared else ""
    # The lock belongs to the session: a process that dies releases it when its connection ends.
    with engine.connect() as connection:
        connection.execute(text(f"SELECT pg_advisory_lock{mode}(:key)"), {"key": _UPGRADE_LOCK})
        yield connection


def _with_lock_timeout(url: URL, lock_seconds: float) -> URL:
    # libpq's option is `-c NAME=VALUE`; the space after `-c` may be left out.
    options = f"{url.query.get('options', '')} -clock_timeout={round(lock_seconds * 1000)}"
    return url.update_query_dict({"options": options.strip()})


def create_locking_engine(url: URL, lock_seconds: float | None) -> Engine:
    """Return an engine whose statements wait at most this long for a lock; None: without limit."""
    chosen = url if lock_seconds is None else _with_lock_timeout(url, lock_seconds)
    return create_engine(chosen, poolclass=NullPool)


def _retry_while_locked(
    connection: Connection, patience: Patience, change: Callable[[], None]
) -> None:
    attempts = itertools.count(1)

    def change_or_raise() -> None:
        attempt = next(attempts)
        holders = _try_change(connection, change)
        if holders is None:
            return
        times = f"attempt {attempt} of {patience.attempts}, {patience.lock_seconds:g} s each"
        _log.warning("a table is locked (%s). The oldest transactions: %s", times, holders)
        raise LockBusyError(
            f"a table stayed locked for {attempt} attempts of {patience.lock_seconds:g} s; "
            f"nothing was changed. End the transaction that holds it, and try again: {holders}"
        )

    pauses = every(patience.pause_seconds)
    retry(change_or_raise, pauses, on=LockBusyError, max_attempts=patience.attempts)


def _try_change(connection: Connection, change: Callable[[], None]) -> str | None:
    """Make the change and return None; if a table is locked, return the oldest transactions."""
    try:
        change()
    except OperationalError as error:
        if not isinstance(error.orig, LockNotAvailable):
            raise
        return "; ".join(_list_oldest_transactions(connection)) or "none any more"
    return None


def _list_oldest_transactions(connection: Connection) -> list[str]:
    # PostgreSQL does not name the transaction that held the lock. The oldest are the most likely:
    # `pid 4711 (warmscale, idle in transaction) since 63 s: SELECT count(*) FROM ...`.
    query = """
        SELECT format('pid %s (%s, %s) since %s s: %s', pid, coalesce(application_name, ''), state,
                      round(extract(epoch FROM now() - xact_start)),
                      left(regexp_replace(query, '\\s+', ' ', 'g'), 80))
        FROM pg_stat_activity
        WHERE datname = current_database() AND pid <> pg_backend_pid() AND xact_start IS NOT NULL
        ORDER BY xact_start LIMIT 3
    """
    return list(connection.execute(text(query)).scalars())
