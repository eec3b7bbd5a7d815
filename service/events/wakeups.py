"""Wake-ups: what a commit of any replica makes possible is heard by every replica at once.

`events.record` sends a notice (NOTIFY) in the transaction that wrote the event, so it arrives with
the commit or not at all. One connection of each replica listens, whoever waits here. A notice is a
hint and no fact: who is woken looks in the database, and also looks by itself every few seconds,
since a listener may have been away.
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
WEBHOOKS = "webhooks"  # the topic of events that webhooks may be told
WORK = "work"  # the topic of what may have made a run leasable

_RECONNECT_SECONDS = 1.0
_log = logging.getLogger(__name__)


class Notification:
    """Rings for the notices of one topic; a ring that nobody waited for is kept."""

    def __init__(self) -> None:
        self._rung = asyncio.Event()

    def notify(self) -> None:
        """Wake who waits, or who will wait next."""
        self._rung.set()

    async def wait(self, seconds: float) -> bool:
        """Wait for a ring at most so long; whether there was one."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._rung.wait(), max(0.0, seconds))
        rung = self._rung.is_set()
        self._rung.clear()
        return rung


class Wakeups:
    """The bells of one replica, for its event loop alone."""

    def __init__(self, url: URL) -> None:
        self._conninfo = url.set(drivername="postgresql").render_as_string(hide_password=False)
        self._bells: defaultdict[str, set[Notification]] = defaultdict(set)

    @contextmanager
    def subscribe_to(self, topic: str) -> Generator[Notification]:
        """A bell for a topic: `WORK`, a study's id or a run's id."""
        bell = Notification()
        self._bells[topic].add(bell)
        try:
            yield bell
        finally:
            self._bells[topic].discard(bell)
            if not self._bells[topic]:
                del self._bells[topic]

    @asynccontextmanager
    async def keep_listening(self) -> AsyncGenerator[None]:
        """Listen while inside."""
        task = asyncio.create_task(self._listen())
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def _listen(self) -> None:
        while True:
            try:
                await self._hear()
            except (psycopg.Error, OSError) as error:
                _log.warning("wake-ups come late: the listener is away (%s)", type(error).__name__)
            await asyncio.sleep(_RECONNECT_SECONDS)

    async def _hear(self) -> None:
        connection = await psycopg.AsyncConnection.connect(
            self._conninfo,
            autocommit=True,
            connect_timeout=5,
            application_name="warmscale listener",
            keepalives_idle=10,
            keepalives_interval=5,
            keepalives_count=3,
        )
        async with connection:
            await connection.execute(f"LISTEN {CHANNEL}")
            self._notify(list(self._bells))  # what was said while nobody listened
            async for notice in connection.notifies():
                self._notify(notice.payload.split())

    def _notify(self, topics: list[str]) -> None:
        for topic in topics:
            for bell in self._bells.get(topic, ()):
                bell.notify()
