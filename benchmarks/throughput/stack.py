"""A PostgreSQL with fsync on, a database for each side, and the service as a real process."""

import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psycopg
from optuna.storages import RDBStorage
from sqlalchemy.engine import URL

from benchmarks.ports import free_ports
from service.database import engine
from service.operations import migrations

_START_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class Stack:
    """A running stack: both databases, and the processes of the server and the API."""

    service_url: URL
    optuna_url: str
    postgres_pid: int
    api_pids: tuple[int, ...]
    ports: tuple[int, ...]
    key: str
    corpus: Path
    data_folder: Path

    def connect(self, side: str) -> psycopg.Connection:
        """Return a connection to the database of a side, with Optuna's schema first in its path."""
        url = self.service_url if side == "service" else engine.normalize_url(self.optuna_url)
        text = url.set(drivername="postgresql").render_as_string(hide_password=False)
        path = "-c search_path=optuna,warmscale,public"
        return psycopg.connect(text, options=path, autocommit=True)


@contextmanager
def run_stack(folder: Path, *, replicas: int) -> Generator[Stack]:
    """Start a stack below `folder`, and stop it when the context ends."""
    engine.use_utc()
    with ExitStack() as stop:
        server = stop.enter_context(engine.start_embedded(folder))
        ours = engine.normalize_url(server.get_uri())
        theirs = _create_second_database(ours)
        migrations.upgrade_database(ours)
        RDBStorage(theirs).engine.dispose()
        environment = _make_environment(folder, ours)
        key = _run_command(environment, "key", "create", "benchmark", "--scope", "admin")
        ports = tuple(free_ports(replicas))
        log = stop.enter_context((folder / "api.log").open("wb"))
        apis = [stop.enter_context(_run_api(environment, port, log.fileno())) for port in ports]
        yield Stack(
            service_url=ours,
            optuna_url=theirs,
            postgres_pid=server.get_pid(),
            api_pids=tuple(api.pid for api in apis),
            ports=ports,
            key=key,
            corpus=_write_corpus(folder),
            data_folder=folder,
        )


def _create_second_database(url: URL) -> str:
    # Optuna's side has a database of its own: statistics and bloat of the sides stay apart.
    with psycopg.connect(
        url.set(drivername="postgresql").render_as_string(hide_password=False), autocommit=True
    ) as connection:
        connection.execute("CREATE DATABASE raw")
    return url.set(database="raw").render_as_string(hide_password=False)


def _make_environment(folder: Path, url: URL) -> dict[str, str]:
    here = Path(__file__).resolve().parents[2]
    return os.environ | {
        "TZ": "UTC",
        "PYTHONPATH": os.pathsep.join([str(here), os.environ.get("PYTHONPATH", "")]),
        "WARMSCALE_HOME": str(folder),
        "WARMSCALE_DATA_ROOTS": str(folder),
        "WARMSCALE_DATABASE_URL": url.render_as_string(hide_password=False),
    }


def _run_command(environment: dict[str, str], *arguments: str) -> str:
    command = [sys.executable, "-m", "service.cli", *arguments]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout.strip()


@contextmanager
def _run_api(
    environment: dict[str, str], port: int, log: int
) -> Generator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "service.cli", "serve", "--port", str(port)]
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        _wait_until_ready(process, port)
        yield process
    finally:
        process.terminate()
        process.wait(30)


def _wait_until_ready(process: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=2):
                return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError(f"the API did not get ready on port {port}; see api.log")


def _write_corpus(folder: Path) -> Path:
    corpus = folder / "corpus"
    corpus.mkdir()
    for i in range(40):
        lines = [f"document {i} line {j}: {i * j} is {i} times {j}\n" for j in range(40)]
        (corpus / f"{i:02d}.txt").write_text("".join(lines))
    return corpus
