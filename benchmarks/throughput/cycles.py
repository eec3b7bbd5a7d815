"""The cycle of each side, which a client repeats, with the seconds of each call."""

import http.client
import json
import time
from dataclasses import dataclass
from typing import Any, Protocol

import optuna
from throughput.workload import REPORTS, SPACE, compute_loss, make_curve

from service.client import Client
from service.protocol import FinishRequest, LeaseRequest, Measurement, MeasurementBatch

STARTUP_TRIALS = 10  # as the service sets for a study of 30 trials or more
TOKENS = 8 * 32 * 20
_IDLE_SECONDS = 2.0  # uvicorn closes a connection after 5 s without a request


class Cycle(Protocol):
    """A cycle through a single trial; it notes the seconds of each call."""

    def prepare(self, study: str, pruner: str, /) -> None: ...

    def __call__(self, note: dict[str, list[float]]) -> None: ...

    def close(self) -> None: ...


@dataclass
class Clock:
    """A timer that notes the seconds of a block under a name."""

    note: dict[str, list[float]]
    name: str

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.note.setdefault(self.name, []).append(time.perf_counter() - self.start)


class OptunaCycle:
    """Optuna's cycle: ask + suggest + 3 x report + tell, as in a user's script."""

    def __init__(self, url: str) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.storage = optuna.storages.RDBStorage(url)

    def prepare(self, study: str, pruner: str) -> None:
        self.prunes = pruner != "none"
        self.study = optuna.load_study(
            study_name=study,
            storage=self.storage,
            sampler=optuna.samplers.TPESampler(n_startup_trials=STARTUP_TRIALS, constant_liar=True),
            pruner=_make_pruner(pruner),
        )

    def __call__(self, note: dict[str, list[float]]) -> None:
        with Clock(note, "ask"):
            trial = self.study.ask()
            params = {name: _suggest_value(trial, name, d) for name, d in SPACE.items()}
        for step, value in enumerate(make_curve(params), 1):
            with Clock(note, "trial.report"):
                trial.report(value, step)
                _ = self.prunes and trial.should_prune()  # ignored, so that all cycles are equal
        with Clock(note, "tell"):
            self.study.tell(trial, compute_loss(params))

    def close(self) -> None:
        self.storage.engine.dispose()


def _suggest_value(trial: optuna.Trial, name: str, d: dict[str, Any]) -> float:
    return trial.suggest_float(name, d["low"], d["high"], log=d.get("log", False))


def _make_pruner(name: str) -> optuna.pruners.BasePruner:
    """Return the pruner that the service would make for a long study of 3 evaluations."""
    match name:
        case "median":
            return optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=2)
        case "hyperband":
            return optuna.pruners.HyperbandPruner(
                min_resource=1, max_resource=REPORTS, reduction_factor=3
            )
        case _:
            return optuna.pruners.NopPruner()


class ServiceCycle:
    """Our cycle: lease + 3 x report + finish by `http.client`, with little CPU in the client."""

    def __init__(self, port: int, key: str) -> None:
        self.http = http.client.HTTPConnection("127.0.0.1", port, timeout=90)
        self.used_at = time.monotonic()
        self.headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}

    def prepare(self, study: str, _pruner: str) -> None:
        self.study = study

    def post(self, path: str, body: dict[str, Any], token: str = "") -> dict[str, Any]:
        headers = self.headers | ({"Lease-Token": token} if token else {})
        return self.send_request("POST", path, json.dumps(body), headers)

    def get(self, path: str) -> dict[str, Any]:
        return self.send_request("GET", path, None, self.headers)

    def send_request(
        self, method: str, path: str, body: str | None, headers: dict[str, str]
    ) -> dict[str, Any]:
        # Close it ourselves: a request on a connection that uvicorn is closing would fail.
        if time.monotonic() - self.used_at > _IDLE_SECONDS:
            self.http.close()
        self.http.request(method, path, body, headers)
        response = self.http.getresponse()
        answer = response.read()
        self.used_at = time.monotonic()
        if response.status not in (http.client.OK, http.client.CREATED):
            raise RuntimeError(f"{path}: {response.status} {answer.decode()}")
        return json.loads(answer)

    def __call__(self, note: dict[str, list[float]]) -> None:
        with Clock(note, "lease"):
            lease = self.lease_trial()
        path, token = f"/v1/runs/{lease['run_id']}", lease["lease_token"]
        for step, value in enumerate(make_curve(lease["params"]), 1):
            point = _make_point(step, value)
            with Clock(note, "report"):
                self.post(f"{path}/measurements", {"measurements": [point]}, token)
        end = {"outcome": "succeeded", "val_loss_nats": compute_loss(lease["params"])}
        with Clock(note, "finish"):
            self.post(f"{path}/finish", end, token)

    def close(self) -> None:
        self.http.close()

    def lease_trial(self) -> dict[str, Any]:
        body = {"worker": "benchmark", "study": self.study, "wait_seconds": 30}
        while not (leases := self.post("/v1/leases", body)["leases"]):
            pass
        return leases[0]


class TypedServiceCycle:
    """Our cycle through `service.client`, as in a worker."""

    def __init__(self, port: int, key: str) -> None:
        self.client = Client(f"http://127.0.0.1:{port}", key)

    def prepare(self, study: str, _pruner: str) -> None:
        self.request = LeaseRequest(worker="benchmark", study=study, wait_seconds=30)

    def __call__(self, note: dict[str, list[float]]) -> None:
        with Clock(note, "lease"):
            while not (leases := self.client.lease(self.request)):
                pass
        (lease,) = leases
        for step, value in enumerate(make_curve(lease.params), 1):
            batch = MeasurementBatch(measurements=(Measurement(**_make_point(step, value)),))
            with Clock(note, "report"):
                self.client.report(lease, batch)
        with Clock(note, "finish"):
            end = FinishRequest(outcome="succeeded", val_loss_nats=compute_loss(lease.params))
            self.client.finish(lease, end)

    def close(self) -> None:
        self.client.close()


def _make_point(step: int, value: float) -> dict[str, Any]:
    return {"step": step, "tokens": step * 256, "val_loss_nats": value, "evaluation": step}
