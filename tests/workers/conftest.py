"""A small real HTTP server that speaks the worker half of the protocol, for as long as a test."""

import contextlib
import dataclasses
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from service.client import Client
from service.protocol import (
    LEASE_TOKEN_HEADER,
    CheckpointReply,
    CheckpointReport,
    Decision,
    FinishReply,
    FinishRequest,
    Lease,
    LeaseReply,
    LeaseRequest,
    Measurement,
    MeasurementBatch,
    ReportReply,
    Resources,
)
from warmcore.spec import DataSpec, ModelSpec, RunSpec, TrainSpec

_numbers = itertools.count()
_WRITE = re.compile(r"/v1/runs/([^/]+)/(measurements|checkpoints|finish)")


@dataclasses.dataclass(kw_only=True)
class Written:
    """All that one run was told, in the order of arrival."""

    lease: Lease
    batches: list[tuple[float, tuple[Measurement, ...]]] = dataclasses.field(default_factory=list)
    checkpoints: list[CheckpointReport] = dataclasses.field(default_factory=list)
    steps_at_checkpoint: list[set[int]] = dataclasses.field(default_factory=list)
    finish: FinishRequest | None = None
    finished_at: float | None = None
    leased_at: float | None = None
    decision: Decision = "continue"
    superseded: tuple[str, ...] = ()
    prune_at_evaluation: int | None = None

    @property
    def curve(self) -> list[Measurement]:
        return [m for _, batch in self.batches for m in batch]


class FakeService:
    """Holds leases to hand out and what came back; can be away, and can disown a lease."""

    def __init__(self) -> None:
        self.queue: list[Lease] = []
        self.runs: dict[str, Written] = {}
        self.requests: list[LeaseRequest] = []
        self.away = False
        self.refuses = False
        self.stale: set[str] = set()
        self.changed = threading.Condition()

    def offer(self, lease: Lease, **options: Any) -> Written:
        with self.changed:
            self.runs[lease.run_id] = Written(lease=lease, **options)
            self.queue.append(lease)
            self.changed.notify_all()
        return self.runs[lease.run_id]

    def wait_for(self, done: Callable[[], Any], seconds: float = 30.0) -> None:
        with self.changed:
            assert self.changed.wait_for(done, seconds), "did not happen"

    def answer(self, path: str, token: str | None, body: str) -> tuple[int, str]:
        with self.changed:
            if self.away:
                return 503, json.dumps({"title": "away"})
            if self.refuses:
                return 401, json.dumps({"title": "unknown key"})
            if path == "/v1/leases":
                return 200, self._lease(LeaseRequest.model_validate_json(body)).model_dump_json()
            run_id, what = _WRITE.fullmatch(path).groups()
            run = self.runs[run_id]
            if run_id in self.stale or token != run.lease.lease_token or run.finish:
                return 409, json.dumps({"type": "urn:warmscale:stale-lease", "title": "stale"})
            reply = getattr(self, f"_{what}")(run, body)
            self.changed.notify_all()
            return 200, reply.model_dump_json()

    def _lease(self, request: LeaseRequest) -> LeaseReply:
        self.requests.append(request)
        self.changed.notify_all()
        self.changed.wait_for(lambda: self.queue, request.wait_seconds)
        cpus, gpus, taken = request.resources.cpus, request.resources.gpus, []
        for lease in list(self.queue):
            if lease.resources.cpus <= cpus and lease.resources.gpus <= gpus:
                cpus, gpus = cpus - lease.resources.cpus, gpus - lease.resources.gpus
                self.queue.remove(lease)
                taken.append(lease)
                self.runs[lease.run_id].leased_at = time.monotonic()
        return LeaseReply(leases=tuple(taken))

    def _measurements(self, run: Written, body: str) -> ReportReply:
        batch = MeasurementBatch.model_validate_json(body).measurements
        run.batches.append((time.monotonic(), batch))
        evaluations = [m.evaluation for m in batch if m.evaluation is not None]
        if run.prune_at_evaluation in evaluations:
            run.decision = "prune"
        return ReportReply(decision=run.decision)

    def _checkpoints(self, run: Written, body: str) -> CheckpointReply:
        run.checkpoints.append(CheckpointReport.model_validate_json(body))
        run.steps_at_checkpoint.append({m.step for m in run.curve})
        return CheckpointReply(decision=run.decision, superseded=run.superseded)

    def _finish(self, run: Written, body: str) -> FinishReply:
        run.finish, run.finished_at = FinishRequest.model_validate_json(body), time.monotonic()
        state = "queued" if run.finish.outcome == "released" else "succeeded"
        return FinishReply(state=state)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    fake: FakeService

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        status, answer = self.fake.answer(self.path, self.headers[LEASE_TOKEN_HEADER], body)
        self.send_response(status)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer.encode())

    def log_message(self, *args: Any) -> None:
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *args: Any) -> None:
        """A client that was killed is no news."""


@pytest.fixture(autouse=True, scope="session")
def _one_thread_and_an_own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        torch.set_num_threads(1)  # what `cpus.pinned` gives these runs; two would fight for a core
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@contextlib.contextmanager
def serving(fake: FakeService) -> Iterator[str]:
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"fake": fake}))
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def fake() -> FakeService:
    return FakeService()


@pytest.fixture
def url(fake: FakeService) -> Iterator[str]:
    with serving(fake) as url:
        yield url


@pytest.fixture
def client(url: str) -> Iterator[Client]:
    with Client(url, "key", patience_seconds=20) as client:
        yield client


@pytest.fixture
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small folder of documents with something to learn in it."""
    folder = tmp_path_factory.mktemp("text")
    for i in range(40):
        lines = (f"line {n}: the square of {n} is {n * n}, said document {i}\n" for n in range(60))
        (folder / f"{i:02d}.txt").write_text("".join(lines))
    return folder


@pytest.fixture
def make_lease(tmp_path: Path, text: Path) -> Callable[..., Lease]:
    """Leases of small runs; keyword arguments override the lease's or the train spec's fields."""

    def make(*, num_steps: int = 20, train: dict[str, Any] | None = None, **fields: Any) -> Lease:
        number = next(_numbers)
        options = {"batch_size": 4, "log_every": 5, "evaluations": 4, "eval_tokens": 512}
        spec = RunSpec(
            model=ModelSpec(width=16, depth=1, head_dim=16),
            data=DataSpec(source=str(text), context=32),
            train=TrainSpec(**options | {"num_tokens": num_steps * 128} | (train or {})),
        )
        values = {
            "run_id": f"run-{number}",
            "study_id": "s",
            "study_name": "study",
            "kind": "trial",
            "trial_number": number,
            "arm": None,
            "attempt": 1,
            "lease_token": f"token-{number}",
            "lease_seconds": 30.0,
            "spec": spec,
            "params": {},
            "resources": Resources(cpus=1),
            "artifact_uri": (tmp_path / "artifacts" / f"run-{number}" / "attempt-1").as_uri(),
            "resume_from": (),
            "reported_step": 0,
        }
        return Lease.model_validate(values | fields)

    return make


class FleetProcess:
    """A fleet as a user starts one, in a process of its own."""

    def __init__(self, url: str, log: Path, *options: str) -> None:
        self.log = log
        with log.open("w") as stream:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "workers.fleet", "--url", url, *options],
                env=os.environ | {"WARMSCALE_API_KEY": "key"},
                stdout=stream,
                stderr=stream,
            )

    def wait_until_ready(self, seconds: float = 60.0) -> None:
        deadline = time.monotonic() + seconds
        while " ready " not in self.log.read_text():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)

    def signal(self, signum: signal.Signals) -> None:
        self.process.send_signal(signum)

    def descendants(self) -> dict[int, str]:
        """Process ids and titles below the fleet."""
        parents, titles = {}, {}
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError):
                pid = int(entry.name)
                parents[pid] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                titles[pid] = (entry / "cmdline").read_text().replace("\0", " ").strip()
        found = {self.process.pid}
        while below := {p for p, parent in parents.items() if parent in found} - found:
            found |= below
        return {pid: titles[pid] for pid in found - {self.process.pid}}

    def worker_pids(self) -> set[int]:
        """Processes in which runs run."""
        below = self.descendants()
        agents = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
        return {p for p, t in below.items() if t.startswith("ray::") and t not in agents}

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def start_fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., FleetProcess]]:
    """Start fleets that end with the module at the latest."""
    with contextlib.ExitStack() as stack:

        def start(url: str, *options: str) -> FleetProcess:
            fleet = FleetProcess(url, tmp_path_factory.mktemp("fleet") / "log", *options)
            stack.callback(fleet.stop)
            return fleet

        yield start


@pytest.fixture(scope="module")
def shared_fake() -> FakeService:
    return FakeService()


@pytest.fixture(scope="module")
def shared_url(shared_fake: FakeService) -> Iterator[str]:
    with serving(shared_fake) as url:
        yield url
