"""The program as a user runs it: an API process and a fleet process that tests kill."""

import os
import signal
import subprocess
import sys
import time

import httpx
import psutil
import pytest
from sqlalchemy import create_engine
from sqlalchemy.orm import sessionmaker

from tests.conftest import create_database, make_scratch_folder, make_settings

KEY_SCOPES = ["admin"]


class Processes:
    """An API and a fleet on a database; tests can kill each and start it again."""

    def __init__(self, url, settings, key, folder):
        self.database_url, self.settings, self.key, self.folder = url, settings, key, folder
        self.api = self.fleet = None
        self.url = f"http://127.0.0.1:{settings.port}"

    def environment(self):
        return os.environ | {
            "TZ": "UTC",
            "WARMSCALE_DATABASE_URL": self.database_url.render_as_string(hide_password=False),
            "WARMSCALE_HOME": str(self.settings.home),
            "WARMSCALE_PORT": str(self.settings.port),
            # Short leases: the runs of a killed fleet go on after 3 s.
            "WARMSCALE_LEASE_SECONDS": "3",
            "WARMSCALE_DATA_ROOTS": "/",
            "WARMSCALE_API_KEY": self.key,
            "XDG_CACHE_HOME": str(self.folder / "cache"),
        }

    def start(self, name, *command):
        with (self.folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, *command],
                env=self.environment(),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def start_api(self):
        self.api = self.start("api", "-m", "service.cli", "serve")
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            try:
                if httpx.get(f"{self.url}/readyz").is_success:
                    return
            except httpx.TransportError:
                time.sleep(0.1)
        raise TimeoutError((self.folder / "api.log").read_text()[-3000:])

    def start_fleet(self):
        self.fleet = self.start(
            "fleet", "-m", "workers.fleet", "--url", self.url, "--cpus", "2",
            "--checkpoint-seconds", "0.4",
        )  # fmt: skip

    def start_what_is_down(self):
        if self.api is None or self.api.poll() is not None:
            self.start_api()
        if self.fleet is None or self.fleet.poll() is not None:
            self.start_fleet()

    def log(self, name):
        return (self.folder / f"{name}.log").read_text()

    def stop(self):
        # The fleet first: it gives its runs back through the API.
        for process in (self.fleet, self.api):
            if process is not None and process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in (self.fleet, self.api):
            if process is not None:
                try:
                    process.wait(30)
                except subprocess.TimeoutExpired:
                    kill_process(process)


def kill_process(process):
    os.kill(process.pid, signal.SIGKILL)
    process.wait(10)


def training_processes(fleet):
    """Return the processes of a fleet that run a task; Ray names a process after its task."""
    children = psutil.Process(fleet.pid).children(recursive=True)
    return [p for p in children if "ray::run_lease" in _read_command(p)]


def _read_command(process):
    """Return the command line; it is empty if the process has ended since it was listed."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@pytest.fixture(scope="module")
def stack(postgres, tmp_path_factory):
    """API and fleet for all tests of a module; each test restarts the processes that it kills."""
    from service.access import keys

    with make_scratch_folder() as home, create_database(postgres) as url:
        engine = create_engine(url)
        with sessionmaker(engine).begin() as session:
            _, key = keys.create_key(session, "flow", KEY_SCOPES)
        engine.dispose()
        stack = Processes(url, make_settings(home), key, tmp_path_factory.mktemp("stack"))
        yield stack
        stack.stop()


@pytest.fixture
def processes(stack):
    stack.start_what_is_down()
    yield stack
    check_invariants(stack.database_url)
    for name in ("api", "fleet"):  # pytest prints it when a test fails
        sys.stderr.write(f"--- {name}.log\n{stack.log(name)[-4000:]}\n")


def check_invariants(url):
    """Check every invariant, including the bytes of every checkpoint."""
    from service.operations import invariants

    engine = create_engine(url)
    with invariants.open_snapshot(engine) as session:
        report = invariants.check_database(session, with_files=True)
    engine.dispose()
    assert report.violations == ()


@pytest.fixture
def home(home):
    """The folder of a local stack; its artifacts are checked at the end."""
    from service.database import engine as db

    yield home
    for stack in (home, home / ".warmscale"):  # made by `up`, by `demo`
        if (stack / "artifacts").exists() and (stack / "postgres").exists():
            with db.start_embedded(stack) as server:
                check_invariants(db.normalize_url(server.get_uri()))


@pytest.fixture
def client(processes):
    from service.client import Client

    with Client(processes.url, processes.key, patience_seconds=30) as client:
        yield client


@pytest.fixture
def small_study(study_spec, corpus):
    """Make specs: four trials of a few seconds each, then warm and cold targets on two seeds."""

    def make(**changes):
        spec = {
            "data": {"source": str(corpus), "context": 64},
            "proxy": {"width": 32, "depth": 1, "head_dim": 16},
            "target": {"width": 64, "train": {"num_tokens": 8 * 64 * 100}},
            "train": {
                "batch_size": 8,
                "num_tokens": 8 * 64 * 800,
                "evaluations": 4,
                "eval_tokens": 2048,
            },
            "hpo": {"trials": 4, "parallel": 2, "sampler": "tpe", "pruner": "none"},
            "max_attempts": 5,
        }
        return study_spec(**(spec | changes))

    return make


def wait_for(condition, seconds=120.0, every=0.05):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if result := condition():
            return result
        time.sleep(every)
    raise TimeoutError(f"not within {seconds} s")


@pytest.fixture
def flow():
    """Helpers of this file, for tests that cannot import it."""
    from types import SimpleNamespace

    return SimpleNamespace(
        kill=kill_process, training_processes=training_processes, wait_for=wait_for
    )
