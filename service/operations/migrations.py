"""Upgrades and downgrades of both schemas: ours by our migrations, Optuna's by its own.

A migration that waits for a lock makes every later query of that table wait behind it. So it waits
a few seconds, gives way, and tries again.
"""

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
from service.operations.revisions import Revision, check_not_newer, found
from warmcore.storage.backoff import every, retry

_UPGRADE_LOCK = 0x7761726D  # any constant: whoever changes, copies or replaces tables takes it
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long a migration waits for a lock at a time, how often, and with which pause."""

    lock_seconds: float = 3.0
    attempts: int = 20
    pause_seconds: float = 2.0


class LockBusyError(Exception):
    """Some transaction held on to a table for longer than a migration may wait."""


def alembic_config(url: URL, *, lock_seconds: float | None = None) -> Config:
    """Alembic's configuration, wherever the package is installed."""
    config = _scripts_config()
    config.attributes["url"] = url
    config.attributes["lock_seconds"] = lock_seconds
    return config


def config_on(connection: Connection) -> Config:
    """Alembic's configuration for a transaction that is open already."""
    config = _scripts_config()
    config.attributes["connection"] = connection
    return config


def _scripts_config() -> Config:
    service = Path(__file__).resolve().parents[1]
    beside, inside = service.parent / "alembic", service / "alembic"
    folder = beside if (beside / "env.py").exists() else inside
    config = Config()
    config.set_main_option("script_location", str(folder).replace("%", "%%"))
    return config


@cache
def scripts() -> tuple[Script, ...]:
    """Our migrations, oldest first."""
    return tuple(ScriptDirectory.from_config(_scripts_config()).walk_revisions())[::-1]


@cache
def known_revisions() -> dict[str, tuple[str, ...]]:
    """The revisions that this program knows of each schema, oldest first."""
    from service.optuna_bridge import schema as optuna_schema  # noqa: PLC0415 - optuna takes a second to import

    optuna_schema.check_installed_optuna()
    ours = tuple(script.revision for script in scripts())
    return {SCHEMA: ours, OPTUNA_SCHEMA: optuna_schema.revisions()}


def revisions(connection: Connection) -> tuple[Revision, ...]:
    """Where both schemas of a database stand."""
    return tuple(
        Revision(schema=schema, found=found(connection, schema), known=known)
        for schema, known in known_revisions().items()
    )


def upgrade(url: URL, patience: Patience = Patience()) -> None:
    """Bring our schema and Optuna's to the newest version; many callers at once are fine.

    Raises:
        NewerDatabaseError: a later version has been here.
        UnknownOptunaError: the installed Optuna's tables are not the known ones.
        LockBusyError: a transaction held a table for too long; nothing was changed.
    """
    from service.optuna_bridge import schema as optuna_schema  # noqa: PLC0415 - optuna takes a second to import

    known_revisions()  # refuses an unknown Optuna before the first statement
    config = alembic_config(url, lock_seconds=patience.lock_seconds)
    theirs = optuna_url(_giving_way(url, patience.lock_seconds))
    with tables_held(url) as connection:
        for schema in (SCHEMA, OPTUNA_SCHEMA):
            connection.execute(text(f"CREATE SCHEMA IF NOT EXISTS {schema}"))
        check_not_newer(revisions(connection))
        _patiently(connection, patience, lambda: command.upgrade(config, "head"))
        _patiently(connection, patience, lambda: optuna_schema.upgrade(theirs))


def downgrade(url: URL, revision: str, patience: Patience = Patience()) -> None:
    """Take our schema down to an earlier revision.

    Raises:
        LockBusyError: a transaction held a table for too long; nothing was changed.
    """
    config = alembic_config(url, lock_seconds=patience.lock_seconds)
    with tables_held(url) as connection:
        check_not_newer(revisions(connection))
        _patiently(connection, patience, lambda: command.downgrade(config, revision))


def losses(found_: str | None, to: str) -> list[tuple[str, str]]:
    """What each step down from `found_` to `to` loses, newest first.

    Raises:
        ValueError: `to` is not an earlier revision.
    """
    names = [script.revision for script in scripts()]
    earlier = names[: names.index(found_)] if found_ in names else []
    if to not in earlier:
        works = ", ".join(earlier) or "none"
        raise ValueError(f"--to: the database is at {found_}; below it is {works} (got {to!r})")
    above = scripts()[names.index(to) + 1 : len(earlier) + 1]
    return [(one.revision, getdoc(one.module.downgrade) or "") for one in reversed(above)]


@contextmanager
def tables_held(url: URL, *, shared: bool = False) -> Generator[Connection]:
    """Keep every other migration and restore out while inside; `shared` lets backups be several."""
    engine = create_engine(url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
    mode = "_shared" if shared else ""
    with engine.connect() as connection:
        connection.execute(text(f"SELECT pg_advisory_lock{mode}(:key)"), {"key": _UPGRADE_LOCK})
        yield connection


def _giving_way(url: URL, lock_seconds: float) -> URL:
    options = f"{url.query.get('options', '')} -clock_timeout={round(lock_seconds * 1000)}"
    return url.update_query_dict({"options": options.strip()})


def locking_engine(url: URL, lock_seconds: float | None) -> Engine:
    """An engine whose statements wait so long for a lock; None: as long as it takes."""
    chosen = url if lock_seconds is None else _giving_way(url, lock_seconds)
    return create_engine(chosen, poolclass=NullPool)


def _patiently(connection: Connection, patience: Patience, change: Callable[[], None]) -> None:
    attempts = itertools.count(1)

    def try_change() -> None:
        attempt = next(attempts)
        who = _once(connection, change)
        if who is None:
            return
        times = f"attempt {attempt} of {patience.attempts}, {patience.lock_seconds:g} s each"
        _log.warning("a table is locked (%s). The oldest transactions: %s", times, who)
        raise LockBusyError(
            f"a table stayed locked for {attempt} attempts of {patience.lock_seconds:g} s; "
            f"nothing was changed. End what holds it, and try again: {who}"
        )

    pauses = every(patience.pause_seconds)
    retry(try_change, pauses, on=LockBusyError, max_attempts=patience.attempts)


def _once(connection: Connection, change: Callable[[], None]) -> str | None:
    """Make the change; or give the transactions that may be in its way."""
    try:
        change()
    except OperationalError as error:
        if not isinstance(error.orig, LockNotAvailable):
            raise
        return "; ".join(_oldest_transactions(connection)) or "none any more"
    return None


def _oldest_transactions(connection: Connection) -> list[str]:
    query = """
        SELECT format('pid %s (%s, %s) since %s s: %s', pid, coalesce(application_name, ''), state,
                      round(extract(epoch FROM now() - xact_start)),
                      left(regexp_replace(query, '\\s+', ' ', 'g'), 80))
        FROM pg_stat_activity
        WHERE datname = current_database() AND pid <> pg_backend_pid() AND xact_start IS NOT NULL
        ORDER BY xact_start LIMIT 3
    """
    return list(connection.execute(text(query)).scalars())
