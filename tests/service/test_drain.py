"""The end of an API process: what is under way is finished, what waits is answered, exit code 0."""

import json
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from sqlalchemy import create_engine
from sqlalchemy.orm import Session

from service import auth
from service.client import Client
from service.leases import trials
from service.studies.advance import lock
from tests.by_hand import Worker
from tests.service.replicas import Serving


@pytest.fixture
def serving(settings, database_url, tmp_path):
    one = Serving(settings, database_url, tmp_path / "api.log")
    yield one
    one.process.kill()
    one.process.wait()


@pytest.fixture
def engine(database_url):
    engine = create_engine(database_url)
    yield engine
    engine.dispose()


def wait_until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_sigterm_finishes_what_runs_answers_what_waits_and_exits_with_0(
    serving, engine, study_spec
):
    with Session(engine) as session, session.begin():
        _, key = auth.create_key(session, "test", ["admin"])
    serving.wait_until_ready()
    headers = {"Authorization": f"Bearer {key}"}
    with (
        Client(serving.url, key, patience_seconds=0) as client,
        Session(engine) as holder,
        ThreadPoolExecutor(4) as pool,
        httpx.Client(base_url=serving.url, headers=headers, timeout=60) as http,
    ):
        study = client.post("/v1/studies", study_spec())
        worker = Worker(client)
        busy = worker.lease(2)  # as many as may run at once: a poll waits
        lock(holder, study["id"])
        polls = [pool.submit(worker.lease, 1, wait_seconds=60) for _ in range(2)]
        pause = pool.submit(http.post, f"/v1/studies/{study['id']}/pause")
        stream = pool.submit(http.get, f"/v1/studies/{study['id']}/events")
        time.sleep(1)
        assert not any(future.done() for future in (*polls, pause, stream))
        asked = time.monotonic()
        serving.process.send_signal(signal.SIGTERM)
        assert [poll.result(10) for poll in polls] == [(), ()]
        assert "study.created" in stream.result(10).text
        assert not pause.done()
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{serving.url}/healthz")
        holder.commit()
        assert pause.result(10).json()["state"] == "paused"
        assert serving.process.wait(10) == 0, serving.log.read_text()
        assert time.monotonic() - asked < 8  # it waits for nothing that would last
        assert len(busy) == 2
    assert "Traceback" not in serving.log.read_text()


def test_a_lease_whose_client_is_gone_is_given_back_at_once(api, submit, worker, monkeypatch):
    submit()
    reached, gone, lease_of = threading.Event(), threading.Event(), trials.lease_of

    def slow(*arguments, **more):  # too late to grant nothing
        reached.set()
        assert gone.wait(20)
        time.sleep(0.2)  # the server's loop hears of it
        return lease_of(*arguments, **more)

    monkeypatch.setattr(trials, "lease_of", slow)
    body = json.dumps({"worker": "gone", "resources": {"cpus": 1}})
    request = (
        f"POST /v1/leases HTTP/1.1\r\nHost: test\r\nAuthorization: Bearer {api.key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}"
    )
    with socket.create_connection(("127.0.0.1", httpx.URL(api.url).port)) as client:
        client.sendall(request.encode())
        assert reached.wait(20)
    gone.set()

    def given_back():
        runs = api.client.get("/v1/runs")["items"]
        return [(r["state"], r["attempt"], r["failures"]) for r in runs] == [("queued", 1, 0)]

    wait_until(given_back)
    monkeypatch.undo()
    assert worker.one().attempt == 2


def test_nothing_is_granted_once_the_end_has_begun(api, submit, worker):
    submit()
    api.app.state.drain.begin()
    assert worker.lease(1, wait_seconds=5) == ()
