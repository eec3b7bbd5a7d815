"""Wake-ups: a commit of any replica notifies every replica at once.

`audit_log.record_events` sends a PostgreSQL notification (NOTIFY) in the transaction that writes
the events. It therefore arrives with the commit, or never. Each replica listens on a connection of
its own and passes notifications on to its subscribers.

A notification is only a hint: the subscriber reads the facts from the database. It also polls every
few seconds, because a notification is lost while the listener reconnects.
"""

import asyncio
import contextlib
import logging
from collections import defaultdict
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager

import psycopg
from sqlalchemy.engine import URL

CHANNEL = "warmscale"
WEBHOOKS = "webhooks"  # the topic of events that a webhook subscribed to
WORK = "work"  # the topic of events after which a run may be leasable

_RECONNECT_SECONDS = 1.0
_log = logging.getLogger(__name__)


class Notification:
    """A flag, for its only waiter, that a topic has news; a second notification changes nothing.

    A notification that comes while nobody waits is kept for the next `wait`.
    """

    def __init__(self) -> None:
        self._notified = asyncio.Event()

    def notify(self) -> None:
        """Wake the waiter; without a waiter, let the next `wait` return at once."""
        self._notified.set()

    async def wait(self, seconds: float) -> bool:
        """Wait for a notification for at most this time; return whether it came."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._notified.wait(), max(0.0, seconds))
        was_notified = self._notified.is_set()
        self._notified.clear()
        return was_notified


class Wakeups:
    """The subscriptions of a replica, used on the event loop's thread only."""

    def __init__(self, url: URL) -> None:
        self._conninfo = url.set(drivername="postgresql").render_as_string(hide_password=False)
        self._subscribers: defaultdict[str, set[Notification]] = defaultdict(set)

    @contextmanager
    def subscribe_to(self, topic: str) -> Generator[Notification]:
        """Subscribe to a topic while the block runs: `WORK`, a study's id or a run's id."""
        notification = Notification()
        self._subscribers[topic].add(notification)
        try:
            yield notification
        finally:
            self._subscribers[topic].discard(notification)
            if not self._subscribers[topic]:
                del self._subscribers[topic]

    @asynccontextmanager
    async def keep_listening(self) -> AsyncGenerator[None]:
        """Listen for PostgreSQL's notifications while the block runs."""
        task = asyncio.create_task(self._listen_and_reconnect())
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def _listen_and_reconnect(self) -> None:
        while True:
            try:
                await self._listen()
            except (psycopg.Error, OSError) as error:
                kind = type(error).__name__
                _log.warning("wake-ups come late: the listener is disconnected (%s)", kind)
            except Exception:  # noqa: BLE001 - nothing would start this task again
                _log.exception("wake-ups come late: the listener failed")
            await asyncio.sleep(_RECONNECT_SECONDS)

    async def _listen(self) -> None:
        """Pass notifications on until the connection fails."""
        connection = await psycopg.AsyncConnection.connect(
            self._conninfo,
            autocommit=True,
            connect_timeout=5,
            application_name="warmscale listener",
            # A server that vanished sends nothing: without keepalives that looks like silence.
            keepalives_idle=10,
            keepalives_interval=5,
            keepalives_count=3,
        )
        async with connection:
            await connection.execute(f"LISTEN {CHANNEL}")
            # Every subscriber reads once: notifications may have been sent before the LISTEN.
            self._notify_subscribers(list(self._subscribers))
            async for notification in connection.notifies():
                self._notify_subscribers(notification.payload.split())

    def _notify_subscribers(self, topics: list[str]) -> None:
        for topic in topics:
            for notification in self._subscribers.get(topic, ()):
                notification.notify()
