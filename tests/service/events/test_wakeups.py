"""Wake-ups: a commit is heard by every replica, a rollback by none, and a lost listener returns."""

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

LONG = 20.0  # never waited for in full by what passes
SHORT = 0.3


@pytest.fixture
def say(database_url):
    """Write an event of a study that is there, and commit it or not."""
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
    """A replica that listens; a bell for each topic."""
    heard = Wakeups(url)
    with contextlib.ExitStack() as stack:
        bells = [stack.enter_context(heard.subscribe_to(topic)) for topic in topics]
        async with heard.keep_listening():
            for bell in bells:
                assert await bell.wait(LONG)  # rung once when the listener is there
            yield bells


def test_a_commit_that_makes_work_is_heard_by_every_replica(database_url, say):
    async def scene():
        async with replica(database_url, WORK) as [one], replica(database_url, WORK) as [other]:
            await asyncio.to_thread(say, "study.active")
            assert await one.wait(LONG)
            assert await other.wait(LONG)

    asyncio.run(scene())


def test_what_is_rolled_back_or_makes_no_work_wakes_nobody(database_url, say):
    async def scene():
        async with replica(database_url, WORK) as [work]:
            await asyncio.to_thread(say, "study.active", commit=False)
            await asyncio.to_thread(say, "study.paused")
            await asyncio.to_thread(say, "run.queued", trial=3)  # by the lease that takes it
            assert not await work.wait(SHORT)
            await asyncio.to_thread(say, "run.queued")
            assert await work.wait(LONG)

    asyncio.run(scene())


def test_the_outbox_is_woken_only_for_what_a_webhook_wants(database_url, say):
    async def scene():
        async with replica(database_url, WEBHOOKS) as [outbox]:
            await asyncio.to_thread(say, "study.completed")
            assert not await outbox.wait(SHORT)
            engine = create_engine(database_url)
            with Session(engine) as session, session.begin():
                store.add_webhook(session, "http://127.0.0.1/", ["study.failed"], project=None)
            engine.dispose()
            await asyncio.to_thread(say, "study.completed")
            assert not await outbox.wait(SHORT)
            await asyncio.to_thread(say, "study.failed")
            assert await outbox.wait(LONG)

    asyncio.run(scene())


def test_every_event_is_heard_by_who_follows_its_study(database_url, say):
    async def scene():
        async with replica(database_url, "st_1", "st_2") as [mine, other]:
            await asyncio.to_thread(say, "study.paused")
            assert await mine.wait(LONG)
            assert not await other.wait(SHORT)

    asyncio.run(scene())


def test_a_ring_before_the_wait_is_kept(database_url, say):
    async def scene():
        bell = wakeups.Notification()
        bell.notify()
        assert await bell.wait(0)
        assert not await bell.wait(0)

    asyncio.run(scene())


def test_a_listener_that_lost_its_connection_comes_back_and_says_so(
    database_url, say, postgres, monkeypatch
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
            assert await work.wait(LONG)  # it may have missed something, so all look
            await asyncio.to_thread(say, "study.active")
            assert await work.wait(LONG)

    asyncio.run(scene())


def test_a_listener_goes_on_after_any_exception_and_says_so(database_url, say, monkeypatch, caplog):
    monkeypatch.setattr(wakeups, "_RECONNECT_SECONDS", 0.01)
    listen = Wakeups._listen

    async def broken(_):
        monkeypatch.setattr(Wakeups, "_listen", listen)
        raise KeyError("unforeseen")

    async def scene():
        monkeypatch.setattr(Wakeups, "_listen", broken)
        async with replica(database_url, WORK) as [work]:
            await asyncio.to_thread(say, "study.active")
            assert await work.wait(LONG)

    asyncio.run(scene())
    assert "KeyError" in caplog.text
