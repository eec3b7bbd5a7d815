"""A small real HTTP server with the worker half of the protocol, started by a test.

`test_protocol.py` holds it to the laws of the service. In addition a test can make it unavailable
or take a lease away, and it records every message and its time.
"""

import contextlib
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from pydantic import BaseModel, ValidationError

from service.problems import Problem, bad_field, conflict, not_found
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
from service.web.error_handlers import MEDIA_TYPE, validation_problem
from tests.workers.fake_run import Batch, Published, Run
from warmcore.specs import RunSpec

_WRITE = re.compile(r"/v1/runs/([^/]+)/(measurements|checkpoints|finish)")
_POLL_SECONDS = 0.05


class FakeService:
    """Runs to lease, and the messages about them."""

    def __init__(self, artifact_root: str, key: str = "key") -> None:
        self.artifact_root, self.key = artifact_root, key
        self.runs: dict[str, Run] = {}
        self.requests: list[LeaseRequest] = []
        self.away = False
        self.changed = threading.Condition()

    # Called by tests

    def offer(
        self,
        spec: RunSpec,
        *,
        cpus: int = 1,
        gpus: float = 0.0,
        processes: int | None = None,
        **fields: Any,
    ) -> Run:
        """Queue a run."""
        resources = Resources(cpus=cpus, gpus=gpus, processes=processes)
        with self.changed:
            number = len(self.runs)
            place = {"id": f"run-{number}", "number": number, "artifact_root": self.artifact_root}
            run = Run(spec=spec, resources=resources, **place, **fields)
            self.runs[run.id] = run
            self.changed.notify_all()
        return run

    def leased(self, spec: RunSpec, **fields: Any) -> Run:
        """Queue a run and lease it at once."""
        with self.changed:  # a fleet could lease the run in between
            run = self.offer(spec, **fields)
            run.next_lease()
        return run

    def disown(self, run: Run) -> None:
        """Lease the run to another worker."""
        with self.changed:
            run.next_lease()

    def cancel(self, run: Run) -> None:
        with self.changed:
            run.state = "cancelled"

    def wait_for(self, done: Any, seconds: float = 90.0) -> None:
        with self.changed:
            assert self.changed.wait_for(done, seconds), "did not happen"

    # Requests of workers

    def answer(self, path: str, headers: Any, body: bytes) -> BaseModel:
        """Answer a request; raise `Problem` or `ValidationError` as the service does."""
        with self.changed:
            if self.away:
                raise Problem(503, "away", "the test wants it so")
            if headers["Authorization"] != f"Bearer {self.key}":
                raise Problem(401, "unauthorized", "this API key is unknown, expired or revoked")
            try:
                return self._route_request(path, headers[LEASE_TOKEN_HEADER], body)
            finally:
                self.changed.notify_all()

    def _route_request(self, path: str, token: str | None, body: bytes) -> BaseModel:
        if path == "/v1/leases":
            request = LeaseRequest.model_validate_json(body)
            if request.study not in {None, *(run.study for run in self.runs.values())}:
                raise not_found("study", str(request.study))
            return self._lease(request)
        match = _WRITE.fullmatch(path)
        if match is None:
            raise not_found("path", path)
        message, write = {
            "measurements": (MeasurementBatch, self._report),
            "checkpoints": (CheckpointReport, self._publish),
            "finish": (FinishRequest, self._finish),
        }[match[2]]
        given = message.model_validate_json(body)
        if token is None:
            raise bad_field(LEASE_TOKEN_HEADER, None, "Field required")
        if match[1] not in self.runs:
            raise not_found("run", match[1])
        return write(self.runs[match[1]], token, given)

    def _lease(self, request: LeaseRequest) -> LeaseReply:
        deadline = time.monotonic() + request.wait_seconds
        self.requests.append(request)
        self.changed.notify_all()
        while not (leases := self._lease_due_runs(request)):
            left = deadline - time.monotonic()
            if left <= 0:
                break
            self.changed.wait(min(left, _POLL_SECONDS))
        return LeaseReply(leases=leases)

    def _lease_due_runs(self, request: LeaseRequest) -> tuple[Lease, ...]:
        now, free = time.monotonic(), request.resources
        taken: list[Lease] = []
        for run in self.runs.values():
            if run.state == "leased" and run.expires_at < now:
                run.end(FinishRequest(outcome="failed", error="lease expired"))
            needs = run.resources
            fits = needs.cpus <= free.cpus and needs.gpus <= free.gpus
            is_due = run.state == "queued" and run.available_at <= now
            if is_due and fits and _matches_request(run, request) and len(taken) < request.max_runs:
                taken.append(run.next_lease())
                free = Resources(cpus=free.cpus - needs.cpus, gpus=max(0.0, free.gpus - needs.gpus))
        return tuple(taken)

    def _report(self, run: Run, token: str, batch: MeasurementBatch) -> ReportReply:
        decision = _renew_lease(run, token)
        if decision == "continue":
            run.batches.append(Batch(time.monotonic(), run.attempt, batch.measurements))
            if any(_is_too_bad(run, point) for point in batch.measurements):
                decision = "prune"
        return ReportReply(decision=decision)

    def _publish(self, run: Run, token: str, report: CheckpointReport) -> CheckpointReply:
        decision = _renew_lease(run, token)
        if decision == "cancel":
            return CheckpointReply(decision=decision)
        place = f"{self.artifact_root}/{run.id}/attempt-{run.attempt:03d}/"
        if not report.uri.startswith(place) or "/../" in f"{report.uri}/":
            raise bad_field("uri", report.uri, f"run {run.id} publishes below {place}")
        _add_checkpoint(run, report)
        return CheckpointReply(decision=decision, superseded=run.push_out())

    def _finish(self, run: Run, token: str, finish: FinishRequest) -> FinishReply:
        if finish.outcome == "succeeded" and finish.val_loss_nats is None:
            raise bad_field("val_loss_nats", None, "a succeeded run has a final validation loss")
        if token != run.token:
            raise _stale(run)
        if run.state == "leased":
            run.end(finish)
        return FinishReply(state=run.state)


def _matches_request(run: Run, request: LeaseRequest) -> bool:
    return request.study in (None, run.study) and run.kind in (request.kinds or (run.kind,))


def _renew_lease(run: Run, token: str) -> Decision:
    """Renew the lease; return "cancel" if the run was cancelled in the meantime."""
    if token != run.token or run.state not in ("leased", "cancelled"):
        raise _stale(run)
    run.renew()
    return "continue" if run.state == "leased" else "cancel"


def _stale(run: Run) -> Problem:
    return conflict("stale-lease", f"run {run.id} is no longer leased under this token; stop")


def _is_too_bad(run: Run, point: Measurement) -> bool:
    """Return whether a pruner that ends every run at a given evaluation ends this run here."""
    last = run.prune_at_evaluation
    return last is not None and point.evaluation is not None and point.evaluation >= last


def _add_checkpoint(run: Run, report: CheckpointReport) -> None:
    key = (run.attempt, report.step)
    known = [row for row in run.published if (row.attempt, row.report.step) == key]
    if not known:
        row = Published(attempt=run.attempt, report=report, final=report.final)
        run.published.append(row)
    elif known[0].report.hash != report.hash:
        raise conflict("checkpoint-exists", f"run {run.id} has published step {report.step}")
    else:
        known[0].final = known[0].final or report.final


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Nagle's algorithm would delay the body by 40 ms, until the headers are acknowledged.
    disable_nagle_algorithm = True
    fake: FakeService

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        try:
            self._send(200, "application/json", self.fake.answer(self.path, self.headers, body))
        except Problem as problem:
            self._send_problem(problem)
        except ValidationError as error:
            self._send_problem(validation_problem(list(error.errors()), None))

    def _send_problem(self, problem: Problem) -> None:
        body = {
            "type": f"urn:warmscale:{problem.kind}",
            "status": problem.status,
            "detail": problem.detail,
            "errors": [field.model_dump(mode="json") for field in problem.errors],
        }
        self._send(problem.status, MEDIA_TYPE, body)

    def _send(self, status: int, media_type: str, answer: BaseModel | dict[str, Any]) -> None:
        is_model = isinstance(answer, BaseModel)
        content = (answer.model_dump_json() if is_model else json.dumps(answer)).encode()
        self.send_response(status)
        self.send_header("Content-Type", media_type)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *args: Any) -> None:
        """Print nothing: a killed client is expected."""


@contextlib.contextmanager
def serving(fake: FakeService):
    """Serve `fake` until the context ends; yield its URL."""
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"fake": fake}))
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()
