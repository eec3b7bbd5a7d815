"""The end of an API process: it finishes requests, answers waiting calls, and exits with 0."""

import asyncio
import json
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from sqlalchemy import create_engine, select, text
from sqlalchemy.orm import Session

from service.access import keys
from service.client import Client
from service.database.tables import ApiKey
from service.leases import new_trials
from service.studies.locks import lock_study
from service.web.services import find_service
from service.web.shutdown import Shutdown
from tests.by_hand import Worker
from tests.service.whole_service.replicas import Serving

LONG = 60.0  # the longest wait of a long-poll


@pytest.fixture
def serving(settings, database_url, tmp_path):
    served = Serving(settings, database_url, tmp_path / "api.log")
    yield served
    served.process.kill()
    served.process.wait()


@pytest.fixture
def engine(database_url):
    engine = create_engine(database_url)
    yield engine
    engine.dispose()


def wait_until(condition, seconds=LONG / 2):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def count_blocked(engine):
    """Count the connections that wait for a lock."""
    with engine.connect() as connection:
        query = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
        return connection.scalar(text(query))


def read_stream(http, study, begun):
    """Return the lines of a study's stream; set `begun` after the first line."""
    with http.stream("GET", f"/v1/studies/{study['id']}/events") as response:
        lines = response.iter_lines()
        first = next(lines)
        begun.set()
        return [first, *lines]


def test_sigterm_finishes_what_runs_answers_what_waits_and_exits_with_0(
    serving, engine, study_spec
):
    with Session(engine) as session, session.begin():
        _, key = keys.create_key(session, "test", ["admin"])
        work = [keys.create_key(session, name, ["work"])[1] for name in ("a", "b")]
    serving.wait_until_ready()
    headers, begun = {"Authorization": f"Bearer {key}"}, threading.Event()
    with (
        Client(serving.url, key, patience_seconds=0) as client,
        Client(serving.url, work[0], patience_seconds=0) as one,
        Client(serving.url, work[1], patience_seconds=0) as other,
        Session(engine) as holder,
        ThreadPoolExecutor(4) as pool,
        httpx.Client(base_url=serving.url, headers=headers, timeout=2 * LONG) as http,
    ):
        study = client.post("/v1/studies", study_spec())
        assert len(Worker(client).lease(2)) == 2  # as many as may run at once: further polls wait
        polls = [pool.submit(Worker(c).lease, 1, wait_seconds=LONG) for c in (one, other)]
        wait_until(lambda: are_all_used(engine))
        lock_study(holder, study["id"])
        pause = pool.submit(http.post, f"/v1/studies/{study['id']}/pause")
        stream = pool.submit(read_stream, http, study, begun)
        wait_until(lambda: count_blocked(engine) == 1 and begun.is_set())
        # A poll enters the queue some time after its key was checked.
        time.sleep(0.5)
        assert not any(future.done() for future in (*polls, pause, stream))
        serving.process.send_signal(signal.SIGTERM)
        assert [poll.result(LONG / 2) for poll in polls] == [(), ()]
        assert "event: study.created" in stream.result(LONG / 2)
        assert not pause.done()
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{serving.url}/healthz")
        holder.commit()
        assert pause.result(LONG / 2).json()["state"] == "paused"
        assert serving.process.wait(LONG / 2) == 0, serving.log.read_text()
    log = serving.log.read_text()
    assert "Traceback" not in log
    assert "graceful shutdown exceeded" not in log  # no call held the exit up


def are_all_used(engine):
    """Return whether every key has been used."""
    with Session(engine) as session:
        return None not in session.scalars(select(ApiKey.last_used_at)).all()


def test_a_lease_whose_client_is_gone_is_given_back_at_once(api, submit, worker, monkeypatch):
    submit()
    reached, gone, make_lease = threading.Event(), threading.Event(), new_trials.make_lease

    def slow(*arguments, **more):  # the disconnect comes after the grant
        reached.set()
        assert gone.wait(LONG / 2)
        time.sleep(0.2)  # the server's event loop sees the disconnect
        return make_lease(*arguments, **more)

    monkeypatch.setattr(new_trials, "make_lease", slow)
    body = json.dumps({"worker": "gone", "resources": {"cpus": 1}})
    request = (
        f"POST /v1/leases HTTP/1.1\r\nHost: test\r\nAuthorization: Bearer {api.key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}"
    )
    # A raw socket, because httpx would wait for the answer before it closes.
    with socket.create_connection(("127.0.0.1", httpx.URL(api.url).port)) as client:
        client.sendall(request.encode())
        assert reached.wait(LONG / 2)
    gone.set()

    def is_queued_again():
        runs = api.client.get("/v1/runs")["items"]
        return [(r["state"], r["attempt"], r["failures"]) for r in runs] == [("queued", 1, 0)]

    wait_until(is_queued_again)
    monkeypatch.undo()
    assert worker.lease_one().attempt == 2


def test_nothing_is_granted_once_the_end_has_begun(api, submit, worker):
    submit()
    find_service(api.app, Shutdown).begin()
    assert worker.lease(1, wait_seconds=5) == ()


def test_what_fails_while_it_is_waited_for_is_raised():
    async def fails():
        raise KeyError("unforeseen")

    async def wait():
        with pytest.raises(KeyError):
            await Shutdown().cut_short(fails())

    asyncio.run(wait())


def test_nothing_that_was_waited_for_goes_on_once_the_end_has_begun():
    async def wait():
        shutdown, before = Shutdown(), asyncio.all_tasks()
        asyncio.get_running_loop().call_soon(shutdown.begin)
        await shutdown.cut_short(asyncio.sleep(LONG))
        assert asyncio.all_tasks() == before

    asyncio.run(wait())
