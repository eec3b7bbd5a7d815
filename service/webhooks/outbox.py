"""Empties the outbox: the one thing that the service does outside of requests.

Every replica runs this. Claims are rows locked with SKIP LOCKED and moved on in time, so no two
replicas try one delivery unless the first was gone for a minute: at least once, normally once.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress

import httpx
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session, sessionmaker
from starlette.concurrency import run_in_threadpool

from service.events.wakeups import WEBHOOKS, Notification, Wakeups
from service.observability import metrics
from service.webhooks import store
from service.webhooks.sending import encode_body, make_client, send_message

_AT_ONCE = 8
_LOOK_SECONDS = 5.0  # for what is to be tried again, and what no bell was heard for
_TIDY_SECONDS = 3600.0
_log = logging.getLogger(__name__)


class Outbox:
    """Deliveries from one database."""

    def __init__(self, sessions: sessionmaker[Session], *, allow_private: bool) -> None:
        self._sessions, self._allow_private = sessions, allow_private
        self._tidied_at: float | None = None

    @asynccontextmanager
    async def keep_delivering(self, wakeups: Wakeups) -> AsyncGenerator[None]:
        """Deliver while inside; what is on its way at the end is tried again after its claim."""
        task = asyncio.create_task(self._run(wakeups))
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def _run(self, wakeups: Wakeups) -> None:
        async with make_client() as http:
            with wakeups.subscribe_to(WEBHOOKS) as bell:
                while True:
                    await self._round(http, bell)

    async def _round(self, http: httpx.AsyncClient, bell: Notification) -> None:
        try:
            found = await self.deliver_due(http)
        except SQLAlchemyError as error:
            _log.warning("webhooks wait", extra={"error": type(error).__name__})
            found = 0
        except Exception:  # noqa: BLE001 - nobody would begin this task again
            _log.exception("webhooks wait")
            found = 0
        if found < _AT_ONCE:
            await bell.wait(_LOOK_SECONDS)

    async def deliver_due(self, http: httpx.AsyncClient) -> int:
        """Try what is due, a few at once; how many there were."""
        claimed = await run_in_threadpool(self._claim)
        tries = (self._try(http, one) for one in claimed)
        for failure in await asyncio.gather(*tries, return_exceptions=True):
            if failure is not None:  # after the others: each of them is another's
                raise failure
        return len(claimed)

    def _claim(self) -> list[store.ClaimedDelivery]:
        now = time.monotonic()
        with self._sessions.begin() as session:
            if self._tidied_at is None or now - self._tidied_at > _TIDY_SECONDS:
                store.delete_old_deliveries(session)
                self._tidied_at = now
            return store.claim_deliveries(session, _AT_ONCE)

    async def _try(self, http: httpx.AsyncClient, one: store.ClaimedDelivery) -> None:
        error = await self._send(http, one)
        outcome = await run_in_threadpool(self._settle, one, error)
        metrics.count_delivery(outcome)
        fields = {"webhook": one.webhook_id, "delivery": one.message_id, "attempt": one.attempts}
        level = logging.INFO if error is None else logging.WARNING
        _log.log(level, "webhook", extra=fields | {"outcome": outcome, "error": error})

    async def _send(self, http: httpx.AsyncClient, one: store.ClaimedDelivery) -> str | None:
        """None when it was taken, else why not; whatever goes wrong is an attempt's failure."""
        try:
            return await send_message(
                http,
                one.url,
                secret=one.secret,
                message_id=one.message_id,
                body=encode_body(one.body),
                allow_private=self._allow_private,
            )
        except Exception as error:  # noqa: BLE001 - one message must not end all deliveries
            _log.exception("a webhook that cannot be written", extra={"delivery": one.message_id})
            return f"not written: {type(error).__name__}"

    def _settle(self, one: store.ClaimedDelivery, error: str | None) -> str:
        with self._sessions.begin() as session:
            return store.settle_delivery(session, one, error)
