"""Tests that the benchmarks run; `benchmarks/README.md` has their results."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from sqlalchemy import create_engine, text

from benchmarks import ports
from benchmarks.chaos.database import Database
from benchmarks.throughput import machine
from tests import conftest

RAYS_LAST_WORKER_PORT = 19_999  # default of `ray start`
LINUX_FIRST_OUTGOING_PORT = 32_768  # default of Linux
ROOT = Path(__file__).resolve().parents[1]


def test_both_sides_of_the_service_benchmark_go_through_their_cycles(tmp_path):
    out = tmp_path / "rows.json"
    script = ["-W", "error::ResourceWarning", "benchmarks/service_throughput.py"]
    command = [sys.executable, *script, "--quick", "--json", str(out)]
    done = subprocess.run(
        command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert "unclosed" not in done.stderr
    (row,) = json.loads(out.read_text())["rows"]
    calls = {name: len(times) for name, times in row["ours"]["calls"].items()}
    assert calls == {"lease": 4, "report": 12, "finish": 4}
    calls = {name: len(times) for name, times in row["theirs"]["calls"].items()}
    assert calls == {"ask": 4, "trial.report": 12, "tell": 4}
    assert "| 20 | 2 | none |" in done.stdout


@pytest.fixture
def refusing():
    """Yield the port of a service that creates studies and fails every request for a lease."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(500 if self.path == "/v1/leases" else 201)
            self.send_header("Content-Length", "9")
            self.end_headers()
            self.wfile.write(b'{"id": 1}')

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def test_a_waiting_worker_that_fails_ends_the_measurement_with_its_reason(refusing, monkeypatch):
    async def nothing(*_):
        return ""

    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import idle_workers

    monkeypatch.setattr(idle_workers, "measure_idle", nothing)
    monkeypatch.setattr(idle_workers, "make_spec", lambda *_: {})
    monkeypatch.setattr(idle_workers, "SETTLE_SECONDS", 0.0)
    running = SimpleNamespace(ports=[refusing], key="key")
    with pytest.raises(ExceptionGroup) as raised:
        asyncio.run(idle_workers.measure_all(running, SimpleNamespace(workers=2, studies=1)))
    assert raised.group_contains(AssertionError)


@pytest.mark.parametrize("gone", [FileNotFoundError, ProcessLookupError])
def test_cpu_time_is_told_though_a_process_ends_while_it_is_read(monkeypatch, gone):
    def read(_):
        raise gone

    monkeypatch.setattr(Path, "read_text", read)
    assert machine.cpu_seconds([1]) == 0


def test_a_database_of_chaos_starts_though_a_process_of_the_one_before_lingers():
    """Start PostgreSQL again while a stopped process of the old server makes it exit."""
    with conftest.make_scratch_folder() as folder:
        folder.chmod(0o755)
        database = Database(folder / "db", ports.free_port(), fsync=False)
        with create_engine(database.url).connect() as held:
            backend = held.execute(text("SELECT pg_backend_pid()")).scalar_one()
            os.kill(backend, signal.SIGSTOP)
            server = database._process
            server.kill()
            server.wait(10)
            later = threading.Timer(2.0, os.kill, (backend, signal.SIGKILL))
            later.start()
            try:
                database.start()
            finally:
                later.join()
            held.invalidate()
        assert database._process is not server
        assert database.is_running
        database.stop()


def test_ports_to_serve_on_are_none_of_rays_workers_and_none_of_connections():
    found = ports.free_ports(200)
    assert len(set(found)) == 200
    assert min(found) > RAYS_LAST_WORKER_PORT
    assert max(found) < LINUX_FIRST_OUTGOING_PORT
