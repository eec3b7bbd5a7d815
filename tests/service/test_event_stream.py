"""Event streams: reconnects lose and repeat no event; without events there are no queries."""

import contextlib
import itertools
import random
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from sqlalchemy import event as hooks
from sqlalchemy import func, select, text, update

from benchmarks.ports import free_port
from service import event_stream
from service.database.tables import ApiKey, Event
from service.events import audit_log
from service.observability import metrics
from service.problems import Problem
from tests.by_hand import EVERYWHERE
from tests.conftest import serve_api

LONG = 30.0


@pytest.fixture
def settings(settings):
    return settings.model_copy(update={"event_heartbeat_seconds": 0.2, "max_event_streams": 8})


@pytest.fixture
def reads(monkeypatch):
    """The times of the reads of all streams. Polls are too rare to be among them."""
    times, read = [], event_stream._read_batch

    def counted(*arguments):
        times.append(time.monotonic())
        return read(*arguments)

    monkeypatch.setattr(event_stream, "_read_batch", counted)
    monkeypatch.setattr(event_stream, "_POLL_SECONDS", LONG)
    return times


@contextlib.contextmanager
def open_stream(api, study, after=None):
    """Open a study's stream; yield its lines, or the response if it is an error."""
    headers = {"Authorization": f"Bearer {api.key}"}
    if after is not None:
        headers["Last-Event-ID"] = after
    url = f"{api.url}/v1/studies/{study['id']}/events"
    with httpx.stream("GET", url, headers=headers, timeout=LONG) as response:
        yield response.iter_lines() if response.is_success else response


def field(lines, name):
    """Return the next value of a field; None at the stream's end."""
    return next((line.partition(": ")[2] for line in lines if line.startswith(f"{name}: ")), None)


def write_event(api, study, type_, *, pause=0.0, commit=True):
    with api.sessions() as session:
        audit_log.record_event(session, type_, study_id=study["id"])
        time.sleep(pause)
        (session.commit if commit else session.rollback)()


def sorted_ids(api, study):
    with api.sessions() as session:
        query = select(Event.xid, Event.id).where(Event.study_id == study["id"])
        return sorted(f"{xid}-{id_}" for xid, id_ in session.execute(query))


@contextlib.contextmanager
def writing(api, study, seeds):
    """Run writers with transactions of up to 50 ms; a fifth of them is rolled back."""

    def write(seed):
        rng = random.Random(seed)  # noqa: S311 - for a test
        for _ in range(12):
            write_event(api, study, "test", pause=rng.uniform(0, 0.05), commit=rng.random() < 0.8)

    with ThreadPoolExecutor(len(seeds)) as pool:
        writers = [pool.submit(write, seed) for seed in seeds]
        yield
        for writer in writers:
            writer.result()


def read_ids(api, study, seen, n):
    """Connect, read at most `n` ids and disconnect; return whether the stream ended before."""
    with open_stream(api, study, seen[-1] if seen else None) as lines:
        for _ in range(n):
            given = field(lines, "id")
            if given is None:
                return True
            seen.append(given)
    return False


@pytest.mark.parametrize("is_settled", [True, False])
def test_nothing_is_lost_or_repeated_while_others_write_and_the_stream_reconnects(
    api, submit, monkeypatch, is_settled
):
    """Control: a stream that reads committed events at once loses the late ones."""
    if not is_settled:
        monkeypatch.setattr(event_stream, "_SETTLED", text("9223372036854775807"))
    study, seen, n = submit(), [], itertools.cycle([1, 4, 2, 6, 3])
    # This transaction gets its id first and commits after later events were read.
    with api.sessions() as early:
        audit_log.record_event(early, "test.early", study_id=study["id"])
        with writing(api, study, [1, 2, 3]):
            read_ids(api, study, seen, 1 if is_settled else 5)
        early.commit()
    with writing(api, study, [4, 5, 6]):
        for _ in range(6):
            read_ids(api, study, seen, next(n))
    api.client.post(f"/v1/studies/{study['id']}/cancel")
    while not read_ids(api, study, seen, next(n)):
        pass
    assert len(set(seen)) == len(seen) > 40
    assert (sorted(seen) == sorted_ids(api, study)) == is_settled


def test_a_stream_begins_with_when_to_come_back_and_shows_that_it_lives(api, submit):
    study = submit()
    with open_stream(api, study) as lines:
        assert next(lines) == ": warmscale"
        assert 1000 <= int(field(lines, "retry")) <= 5000
        assert field(lines, "event") == "study.created"
        # Comments keep the connection alive while nothing happens.
        assert field(lines, "") is not None
        assert field(lines, "") is not None


def test_nothing_is_asked_of_the_database_while_nothing_happens_and_then_at_once(
    api, submit, reads
):
    study = submit()
    with open_stream(api, study) as lines:
        assert field(lines, "event") == "study.created"
        for _ in range(8):
            assert field(lines, "")  # 8 heartbeats, 1.6 s
        before = len(reads)
        assert before <= 2  # when the stream opened, and once more after it subscribed
        write_event(api, study, "test.rolled-back", commit=False)
        write_event(api, study, "test.done")
        begun = time.monotonic()
        assert field(lines, "event") == "test.done"
    assert time.monotonic() - begun < LONG / 2
    assert len(reads) - before <= 2


def test_what_waits_for_another_transaction_comes_when_that_ends_without_a_notice(
    api, submit, reads
):
    study = submit()
    with open_stream(api, study) as lines:
        assert field(lines, "event") == "study.created"
        with api.sessions() as other:
            other.execute(select(func.pg_current_xact_id()))
            write_event(api, study, "test.done")
            # The older transaction holds the event back. Its end sends no notification.
            for _ in range(4):
                assert field(lines, "")
            other.rollback()
            begun = time.monotonic()
            assert field(lines, "event") == "test.done"
    assert time.monotonic() - begun < LONG / 2


def test_an_event_is_not_missed_when_the_older_transaction_ends_during_a_read(api, submit):
    study, other = submit(), api.sessions()
    other.execute(select(func.pg_current_xact_id()))
    write_event(api, study, "test.done")

    # The first statement about events is followed by the end of the older transaction.
    def end_other(connection, cursor, statement, *_):
        if "FROM warmscale.events" in statement:
            other.rollback()

    def topic(session):
        return event_stream.study_topic(session, EVERYWHERE, study["id"])

    hooks.listen(api.engine, "after_cursor_execute", end_other)
    try:
        batch = event_stream._read_batch(api.sessions, topic, (0, 0))
    finally:
        hooks.remove(api.engine, "after_cursor_execute", end_other)
        other.close()
    assert batch.has_unsettled or "test.done" in {event.type for _, event in batch.rows}


def count_streams():
    return metrics.streams._value.get()


@pytest.mark.parametrize("end", ["revoked_at", "expires_at"])
def test_a_stream_ends_with_its_key_and_only_then(api, submit, monkeypatch, end):
    monkeypatch.setattr(event_stream, "_KEY_CHECK_SECONDS", 0.1)
    monkeypatch.setattr(event_stream, "_POLL_SECONDS", 0.1)
    study = submit()
    with open_stream(api, study) as lines:
        assert field(lines, "event") == "study.created"
        write_event(api, study, "test.done")
        assert field(lines, "event") == "test.done"
        with api.sessions.begin() as session:
            session.execute(update(ApiKey).values({end: func.now()}))
        begun = time.monotonic()
        while field(lines, "") is not None:
            assert time.monotonic() - begun < LONG


def test_a_replica_s_streams_are_shared_by_keys():
    streams = event_stream.Streams(8)
    with contextlib.ExitStack() as stack:
        for key in "abcd" * 2:
            stack.enter_context(streams.open_stream(key))
        with pytest.raises(Problem, match="this replica has 8") as full, streams.open_stream("e"):
            pass
        assert full.value.status == 503
    with streams.open_stream("a"), streams.open_stream("a"):
        with pytest.raises(Problem, match="this API key has 2") as share, streams.open_stream("a"):
            pass
        assert (share.value.status, share.value.headers) == (429, {"Retry-After": "5"})


def test_a_key_has_so_many_streams_and_is_refused_one_more_until_one_is_gone(api, submit):
    study, before = submit(), count_streams()
    with open_stream(api, study) as first, open_stream(api, study) as second:
        assert [field(lines, "event") for lines in (first, second)] == ["study.created"] * 2
        assert count_streams() == before + 2
        with open_stream(api, study) as refused:
            refused.read()
        problem = refused.json()
        assert (refused.status_code, refused.headers["Retry-After"]) == (429, "5")
        assert problem["type"] == "urn:warmscale:too-many-streams"
        assert "2 event streams" in problem["detail"]
    deadline = time.monotonic() + LONG
    # The server sees the disconnects when it sends the next heartbeats.
    while count_streams() > before:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    with open_stream(api, study) as lines:
        assert field(lines, "event") == "study.created"


def test_a_stream_goes_on_at_another_replica(api, submit, settings, database_url):
    study = submit()
    other = settings.model_copy(update={"port": free_port()})
    with open_stream(api, study) as lines:
        last = field(lines, "id")
    with serve_api(other, database_url) as replica, open_stream(replica, study, last) as lines:
        write_event(api, study, "test.done")
        assert field(lines, "event") == "test.done"


@pytest.mark.tampers
def test_ten_thousand_events_are_replayed_once_in_order_by_reads_of_a_bounded_size(
    api, submit, monkeypatch
):
    study, read, sizes = submit(), event_stream._read_batch, []
    statement = text(
        "INSERT INTO warmscale.events (study_id, type, payload)"
        " SELECT :study, 'test.old', '{}' FROM generate_series(1, 10000)"
    )
    with api.engine.begin() as connection:
        connection.execute(statement, {"study": study["id"]})
    api.client.post(f"/v1/studies/{study['id']}/cancel")

    def counted(*arguments):
        batch = read(*arguments)
        sizes.append(len(batch.rows))
        return batch

    monkeypatch.setattr(event_stream, "_read_batch", counted)
    monkeypatch.setattr(event_stream, "_SPACING_SECONDS", 0.0)
    with open_stream(api, study) as lines:
        seen = [line.partition(": ")[2] for line in lines if line.startswith("id: ")]
    assert seen == [f"{xid}-{id_}" for xid, id_ in ids_in_order(api, study)]
    assert len(seen) > 10_000
    assert max(sizes) <= 500
    with open_stream(api, study, seen[-2]) as lines:
        assert field(lines, "id") == seen[-1]


def ids_in_order(api, study):
    with api.sessions() as session:
        query = select(Event.xid, Event.id).where(Event.study_id == study["id"])
        return [tuple(row) for row in session.execute(query.order_by(Event.xid, Event.id))]
