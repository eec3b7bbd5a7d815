"""Wake-ups: a commit notifies every replica, a rollback none, and a listener reconnects."""

import asyncio
import contextlib

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.orm import Session

from service.database.tables import Study
from service.events import wakeups
from service.events.audit_log import record_event
from service.events.wakeups import WEBHOOKS, WORK, Wakeups
from service.webhooks import store

LONG = 20.0  # a test that passes never waits this long
SHORT = 0.3


@pytest.fixture
def write_event(database_url):
    """A function that writes an event of study st_1, and commits it or rolls it back."""
    engine = create_engine(database_url)
    with Session(engine) as session, session.begin():
        session.add(Study(id="st_1", name="one", spec={}))

    def event(type_, *, commit=True, **payload):
        with Session(engine) as session:
            record_event(session, type_, study_id="st_1", **payload)
            (session.commit if commit else session.rollback)()

    yield event
    engine.dispose()


@contextlib.asynccontextmanager
async def replica(url, *topics):
    """Run a replica's listener; yield a subscription for each topic."""
    wakeups = Wakeups(url)
    with contextlib.ExitStack() as stack:
        notifications = [stack.enter_context(wakeups.subscribe_to(topic)) for topic in topics]
        async with wakeups.keep_listening():
            # Each subscriber is notified once when the listener is connected.
            for notification in notifications:
                assert await notification.wait(LONG)
            yield notifications


def test_a_commit_that_makes_work_is_heard_by_every_replica(database_url, write_event):
    async def scene():
        async with replica(database_url, WORK) as [first], replica(database_url, WORK) as [other]:
            await asyncio.to_thread(write_event, "study.active")
            assert await first.wait(LONG)
            assert await other.wait(LONG)

    asyncio.run(scene())


def test_what_is_rolled_back_or_makes_no_work_wakes_nobody(database_url, write_event):
    async def scene():
        async with replica(database_url, WORK) as [work]:
            await asyncio.to_thread(write_event, "study.active", commit=False)
            await asyncio.to_thread(write_event, "study.paused")
            # The transaction that queues a new trial also leases it.
            await asyncio.to_thread(write_event, "run.queued", trial=3)
            assert not await work.wait(SHORT)
            await asyncio.to_thread(write_event, "run.queued")
            assert await work.wait(LONG)

    asyncio.run(scene())


def test_the_outbox_is_woken_only_for_what_a_webhook_wants(database_url, write_event):
    async def scene():
        async with replica(database_url, WEBHOOKS) as [outbox]:
            await asyncio.to_thread(write_event, "study.completed")
            assert not await outbox.wait(SHORT)
            engine = create_engine(database_url)
            with Session(engine) as session, session.begin():
                store.add_webhook(session, "http://127.0.0.1/", ["study.failed"], project=None)
            engine.dispose()
            await asyncio.to_thread(write_event, "study.completed")
            assert not await outbox.wait(SHORT)
            await asyncio.to_thread(write_event, "study.failed")
            assert await outbox.wait(LONG)

    asyncio.run(scene())


def test_every_event_is_heard_by_who_follows_its_study(database_url, write_event):
    async def scene():
        async with replica(database_url, "st_1", "st_2") as [mine, other]:
            await asyncio.to_thread(write_event, "study.paused")
            assert await mine.wait(LONG)
            assert not await other.wait(SHORT)

    asyncio.run(scene())


def test_a_ring_before_the_wait_is_kept(database_url, write_event):
    async def scene():
        notification = wakeups.Notification()
        notification.notify()
        assert await notification.wait(0)
        assert not await notification.wait(0)

    asyncio.run(scene())


def test_a_listener_that_lost_its_connection_comes_back_and_says_so(
    database_url, write_event, postgres, monkeypatch
):
    monkeypatch.setattr(wakeups, "_RECONNECT_SECONDS", 0.01)

    def cut():
        with postgres.admin.connect() as connection:
            connection.execute(
                text(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                    "WHERE application_name = 'warmscale listener' AND datname = :name"
                ),
                {"name": database_url.database},
            )

    async def scene():
        async with replica(database_url, WORK) as [work]:
            await asyncio.to_thread(cut)
            # After a reconnection every subscriber is notified: notifications may be lost.
            assert await work.wait(LONG)
            await asyncio.to_thread(write_event, "study.active")
            assert await work.wait(LONG)

    asyncio.run(scene())


def test_a_listener_goes_on_after_any_exception_and_says_so(
    database_url, write_event, monkeypatch, caplog
):
    monkeypatch.setattr(wakeups, "_RECONNECT_SECONDS", 0.01)
    listen = Wakeups._listen

    async def broken(_):
        monkeypatch.setattr(Wakeups, "_listen", listen)
        raise KeyError("unforeseen")

    async def scene():
        monkeypatch.setattr(Wakeups, "_listen", broken)
        async with replica(database_url, WORK) as [work]:
            await asyncio.to_thread(write_event, "study.active")
            assert await work.wait(LONG)

    asyncio.run(scene())
    assert "KeyError" in caplog.text
