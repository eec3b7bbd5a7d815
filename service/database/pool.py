"""Connections are tried before use only after they have been idle.

SQLAlchemy's own `pool_pre_ping` asks the server before every transaction, a round trip of six that
a report has. A connection that was in use a moment ago is taken as good: where it is not after all,
because the server went away just then, that request is a 503, which clients repeat, and the whole
pool is new for the next one.
"""

import time
from typing import Any, cast

import psycopg
from sqlalchemy.exc import InvalidatePoolError
from sqlalchemy.pool import ConnectionPoolEntry

IDLE_SECONDS = 2.0
_SINCE = "idle_since"


def note_checkin(_: Any, entry: ConnectionPoolEntry) -> None:
    """Note when a connection came back."""
    entry.info[_SINCE] = time.monotonic()


def check_idle(connection: Any, entry: ConnectionPoolEntry, _: Any) -> None:
    """Try a connection that has been idle; where it is broken, the pool makes new ones."""
    since = entry.info.get(_SINCE)
    if since is None or time.monotonic() - since < IDLE_SECONDS:
        return
    used = cast("psycopg.Connection[Any]", connection)
    try:
        used.autocommit = True
        used.execute("")
        used.autocommit = False
    except psycopg.Error as error:
        raise InvalidatePoolError("the server has closed an idle connection") from error


# For `create_engine`. The connection that was used last goes first: it has its statements prepared.
OPTIONS: dict[str, Any] = {
    "pool_use_lifo": True,
    "pool_events": [(note_checkin, "checkin"), (check_idle, "checkout")],
}
