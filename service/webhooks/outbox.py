"""The outbox: it delivers events to webhooks, the only work of the service outside of requests.

Every replica runs this. A claim locks rows with SKIP LOCKED and sets their next attempt a minute
ahead. A second replica therefore tries a delivery only if the first was gone for a minute: each
event arrives at least once, and normally once.
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
_POLL_SECONDS = 5.0  # retries fall due without a notification, and a notification can be lost
_CLEANUP_SECONDS = 3600.0
_log = logging.getLogger(__name__)


class Outbox:
    """The sender of a replica's share of the deliveries."""

    def __init__(self, sessions: sessionmaker[Session], *, allow_private: bool) -> None:
        self._sessions, self._allow_private = sessions, allow_private
        self._cleaned_at: float | None = None

    @asynccontextmanager
    async def keep_delivering(self, wakeups: Wakeups) -> AsyncGenerator[None]:
        """Deliver while the block runs.

        A delivery that is in progress at the end is tried again when its claim has expired.
        """
        task = asyncio.create_task(self._deliver_for_ever(wakeups))
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def _deliver_for_ever(self, wakeups: Wakeups) -> None:
        while True:
            try:
                await self._deliver_rounds(wakeups)
            except Exception:  # noqa: BLE001 - nothing would start this task again
                # For example `make_client`, which reads the files of trusted certificates.
                _log.exception("webhook deliveries are delayed")
            await asyncio.sleep(_POLL_SECONDS)

    async def _deliver_rounds(self, wakeups: Wakeups) -> None:
        """Deliver with the same HTTP client, until it cannot be made or the task is cancelled."""
        async with make_client() as http:
            with wakeups.subscribe_to(WEBHOOKS) as notification:
                while True:
                    await self._deliver_round(http, notification)

    async def _deliver_round(self, http: httpx.AsyncClient, notification: Notification) -> None:
        try:
            num_claimed = await self.deliver_due(http)
        except SQLAlchemyError as error:
            _log.warning("webhook deliveries are delayed", extra={"error": type(error).__name__})
            num_claimed = 0
        except Exception:  # noqa: BLE001 - nothing would start this task again
            _log.exception("webhook deliveries are delayed")
            num_claimed = 0
        # After a full round the next one follows at once: further deliveries are probably due.
        if num_claimed < _AT_ONCE:
            await notification.wait(_POLL_SECONDS)

    async def deliver_due(self, http: httpx.AsyncClient) -> int:
        """Try a few deliveries that are due, at the same time; return how many."""
        claimed = await run_in_threadpool(self._claim_due)
        attempts = (self._try_delivery(http, delivery) for delivery in claimed)
        # `gather` returns after the last attempt: a failure cancels no other webhook's delivery.
        for failure in await asyncio.gather(*attempts, return_exceptions=True):
            if failure is not None:
                raise failure
        return len(claimed)

    def _claim_due(self) -> list[store.ClaimedDelivery]:
        now = time.monotonic()
        with self._sessions.begin() as session:
            if self._cleaned_at is None or now - self._cleaned_at > _CLEANUP_SECONDS:
                store.delete_old_deliveries(session)
                self._cleaned_at = now
            return store.claim_deliveries(session, _AT_ONCE)

    async def _try_delivery(self, http: httpx.AsyncClient, delivery: store.ClaimedDelivery) -> None:
        error = await self._send(http, delivery)
        outcome = await run_in_threadpool(self._settle, delivery, error)
        metrics.count_delivery(outcome)
        fields = {
            "webhook": delivery.webhook_id,
            "delivery": delivery.message_id,
            "attempt": delivery.attempts,
        }
        level = logging.INFO if error is None else logging.WARNING
        _log.log(level, "webhook", extra=fields | {"outcome": outcome, "error": error})

    async def _send(self, http: httpx.AsyncClient, delivery: store.ClaimedDelivery) -> str | None:
        """Send a delivery; return None if the receiver accepted it, and the failure if not."""
        try:
            return await send_message(
                http,
                delivery.url,
                secret=delivery.secret,
                message_id=delivery.message_id,
                body=encode_body(delivery.body),
                allow_private=self._allow_private,
            )
        except Exception as error:  # noqa: BLE001 - a message must not end all deliveries
            fields = {"delivery": delivery.message_id}
            _log.exception("the message of a webhook cannot be written", extra=fields)
            return f"not written: {type(error).__name__}"

    def _settle(self, delivery: store.ClaimedDelivery, error: str | None) -> str:
        with self._sessions.begin() as session:
            return store.settle_delivery(session, delivery, error)
