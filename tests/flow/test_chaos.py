"""Chaos as in `make chaos`, for 20 seconds, and each of its parts alone."""

import asyncio
import contextlib
import gc
import json
import os
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path

import httpx
import psutil
import pytest

from benchmarks.chaos.driver import count_lost_and_doubled
from benchmarks.chaos.faults import flip_bit
from benchmarks.chaos.proxy import Proxy
from benchmarks.chaos.report import END_OF_ROWS, append_row
from benchmarks.chaos.schedule import KINDS, plan_faults


@pytest.mark.timeout(900)  # after 798 s, by its own alarm, the program ends and says why
def test_a_study_under_faults_loses_no_trial_and_counts_none_twice():
    command = ["-m", "benchmarks.chaos", "--seed", "5", "--minutes", "0.3", "--trials", "8"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WARMSCALE_")}
    done = subprocess.run(
        [sys.executable, *command, "--gap", "1.5", "--targets", "1", "--no-fsync"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=840,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    *_, last, _row = lines = done.stdout.splitlines()
    found = json.loads(last)
    assert (found["lost"], found["doubled"], found["violations"]) == (0, 0, [])
    assert found["trials"] == 8 * found["studies"]
    assert sum(found["faults"].values()) >= 4
    (folder,) = [json.loads(line)["folder"] for line in lines if line.startswith('{"folder"')]
    running = [" ".join(p.info["cmdline"] or []) for p in psutil.process_iter(["cmdline"])]
    assert not [command for command in running if folder in command]
    assert not Path(folder).exists()


def test_a_seed_gives_one_schedule_with_every_kind_in_each_round():
    one = plan_faults(1, seconds=600, gap_seconds=5)
    assert one == plan_faults(1, seconds=600, gap_seconds=5)
    assert one != plan_faults(2, seconds=600, gap_seconds=5)
    times = [fault.at_seconds for fault in one]
    assert times == sorted(times)
    whole = len(one) // len(KINDS) * len(KINDS)
    for some in (one[i : i + len(KINDS)] for i in range(0, whole, len(KINDS))):
        assert {fault.kind for fault in some} == set(KINDS)


def test_a_longer_run_begins_as_a_shorter_one():
    short = plan_faults(3, seconds=60, gap_seconds=5)
    assert plan_faults(3, seconds=600, gap_seconds=5)[: len(short)] == short


def test_what_is_lost_or_doubled_is_counted():
    def trials(*numbers, state="succeeded"):
        return [{"number": number, "state": state} for number in numbers]

    heard = {0: ("COMPLETE", 1.0), 1: ("PRUNED", None)}
    assert count_lost_and_doubled(2, trials(0, 1), heard) == (0, 0)
    assert count_lost_and_doubled(3, trials(0, 1), heard) == (1, 0)
    assert count_lost_and_doubled(2, trials(0, 1, 1), heard) == (0, 1)
    assert count_lost_and_doubled(2, trials(0) + trials(1, state="failed"), heard) == (1, 0)
    assert count_lost_and_doubled(2, trials(0, 1), heard | {1: ("RUNNING", None)}) == (1, 0)
    assert count_lost_and_doubled(2, trials(0, 1), heard | {2: ("COMPLETE", 1.0)}) == (0, 1)


@pytest.fixture
def backends():
    """Two servers that answer with their own port, padded to 1,000 bytes."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(409 if "stale" in self.path else 200)
            body = f"{self.server.server_port}".encode().rjust(1000)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(body)
            assert self.server.may_end.wait(60)

        def log_message(self, *_):
            pass

    servers = [ThreadingHTTPServer(("127.0.0.1", 0), Handler) for _ in range(2)]
    for server in servers:
        server.may_end = threading.Event()
        server.may_end.set()
    threads = [threading.Thread(target=s.serve_forever, args=(0.02,)) for s in servers]
    for thread in threads:
        thread.start()
    yield servers
    for server, thread in zip(servers, threads, strict=True):
        server.may_end.set()
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def proxy(backends):
    proxy = Proxy([server.server_port for server in backends])
    proxy.start()
    yield proxy
    if proxy._thread.is_alive():
        proxy.stop()


@pytest.fixture
def post(proxy):
    with httpx.Client(base_url=f"http://127.0.0.1:{proxy.port}", timeout=60) as client:
        yield lambda path="/": client.post(path, content=b"x" * 100)


def test_the_proxy_gives_each_request_to_the_next_replica(post, backends):
    ports = [int(post().text) for _ in range(6)]
    assert set(ports) == {server.server_port for server in backends}
    assert all(a != b for a, b in pairwise(ports))


def test_the_proxy_cuts_as_many_answers_as_it_is_told_after_so_many_bytes(post, proxy):
    proxy.cut_answers(answers=2, after_bytes=60)
    for _ in range(2):
        with pytest.raises(httpx.TransportError):
            post()
    assert len(post().content) == 1000
    assert proxy.num_cut == 2


def test_the_proxy_goes_to_the_other_replica_where_one_is_gone(post, backends):
    backends[0].shutdown()
    backends[0].server_close()
    assert {int(post().text) for _ in range(4)} == {backends[1].server_port}


def test_the_proxy_keeps_a_request_whose_client_ended_before_the_backend(
    post, proxy, backends, flow, caplog
):
    """asyncio refers to tasks weakly: a garbage collection may destroy a task that still runs."""
    for server in backends:
        server.may_end.clear()
    assert post().status_code == 200
    flow.wait_for(lambda: len(asyncio.all_tasks(proxy._loop)) == 1)  # the upload has ended
    gc.collect()
    assert len(asyncio.all_tasks(proxy._loop)) == 1
    for server in backends:
        server.may_end.set()
    flow.wait_for(lambda: not asyncio.all_tasks(proxy._loop))
    assert "destroyed" not in caplog.text


def test_the_proxy_closes_every_connection_when_it_stops(proxy):
    """Also connections that it has just accepted: an unclosed socket is a ResourceWarning."""
    address = ("127.0.0.1", proxy.port)
    clients = [socket.create_connection(address, timeout=60) for _ in range(50)]
    proxy.stop()
    assert not proxy._thread.is_alive()
    for client in clients:
        with client, contextlib.suppress(ConnectionResetError):
            assert client.recv(1) == b""
    gc.collect()


def test_the_proxy_counts_what_was_refused(post, proxy):
    post("/v1/runs/run_1/finish?stale")
    post("/v1/leases?stale")
    assert proxy.refused == 1


def test_a_flipped_bit_is_one_bit(tmp_path):
    file = tmp_path / "weights"
    file.write_bytes(bytes(100))
    flip_bit(file, 0.999)
    assert file.read_bytes() == bytes(99) + b"\x01"


def test_a_row_is_put_at_the_end_of_the_table(tmp_path):
    page = tmp_path / "chaos.md"
    page.write_text(f"|a|\n{END_OF_ROWS}\nafter\n")
    append_row(page, "|b|")
    append_row(page, "|c|")
    assert page.read_text() == f"|a|\n|b|\n|c|\n{END_OF_ROWS}\nafter\n"
