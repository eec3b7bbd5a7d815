"""Options of the connection pool: it tests a connection only after the connection was idle.

SQLAlchemy's `pool_pre_ping` would add a round trip to every transaction; a worker's report has only
six. A connection that was in use less than 2 s ago is therefore not tested. If the server went away
in that time, the request fails with a 503. Clients retry it, and the pool opens new connections.
"""

import time
from typing import Any, cast

import psycopg
from sqlalchemy.exc import InvalidatePoolError
from sqlalchemy.pool import ConnectionPoolEntry

IDLE_SECONDS = 2.0
_IDLE_SINCE = "idle_since"  # the key in the connection's `info`


def note_checkin(_: Any, entry: ConnectionPoolEntry) -> None:
    """Note the time at which a connection returns to the pool."""
    entry.info[_IDLE_SINCE] = time.monotonic()


def check_idle(connection: Any, entry: ConnectionPoolEntry, _: Any) -> None:
    """Test a connection that was idle; if it is broken, the pool replaces all its connections."""
    # A new connection has never been returned: it was opened just now.
    since = entry.info.get(_IDLE_SINCE)
    if since is None or time.monotonic() - since < IDLE_SECONDS:
        return
    used = cast("psycopg.Connection[Any]", connection)
    try:
        # An empty statement, outside of a transaction: a single round trip.
        used.autocommit = True
        used.execute("")
        used.autocommit = False
    except psycopg.Error as error:
        raise InvalidatePoolError("the server has closed an idle connection") from error


# Arguments of `create_engine`. LIFO reuses the connection that was used last: our statements are
# already prepared on it.
OPTIONS: dict[str, Any] = {
    "pool_use_lifo": True,
    "pool_events": [(note_checkin, "checkin"), (check_idle, "checkout")],
}
