"""The API and the fake service behind a common interface, for tests of the protocol."""

import dataclasses
from typing import Any

from sqlalchemy import text, update

from service.client import Client
from service.database.tables import Run
from service.lifecycle import FINAL_RUN_STATES
from service.protocol import RunState
from tests.by_hand import Worker


@dataclasses.dataclass(frozen=True, kw_only=True)
class Standing:
    """The record that a service keeps of a run."""

    state: RunState
    attempt: int
    failures: int
    val_loss_nats: float | None
    losses: dict[int, float | None]
    checkpoints: list[tuple[int, bool]]  # step and finality of each kept checkpoint


class Api:
    """The real API."""

    def __init__(self, api: Any, study_spec: Any) -> None:
        self.url, self.key, self.client = api.url, api.key, api.client
        self._sessions, self._study_spec = api.sessions, study_spec

    def offer(self, n: int = 1, *, cpus: int = 1, gpus: float = 0.0, **more: Any) -> str:
        """Queue `n` trials and return the name of their study."""
        hpo = {"trials": n, "parallel": n, "sampler": "random", "pruner": "none"}
        spec = {"hpo": hpo, "resources": {"trial": {"cpus": cpus, "gpus": gpus}}}
        return self.client.post("/v1/studies", self._study_spec(**spec | more))["name"]

    def offer_a_bad_one(self) -> None:
        """Queue a trial that the pruner ends at its first evaluation."""
        pruned = {"sampler": "random", "pruner": "successive_halving"}
        self.offer(hpo={"trials": 2, "parallel": 2} | pruned)
        worker = Worker(self.client)
        worker.evaluate(worker.lease_one(), evaluation=1, loss=0.0)

    def cancel(self, lease: Any) -> None:
        self.client.post(f"/v1/studies/{lease.study_id}/cancel")

    def expire(self) -> None:
        """Let every lease expire."""
        leased = update(Run).where(Run.state == "leased")
        with self._sessions.begin() as session:
            session.execute(leased.values(lease_expires_at=text("now() - interval '1 ms'")))

    def standing(self, lease: Any) -> Standing:
        path = f"/v1/runs/{lease.run_id}"
        run = self.client.get(path)
        points = self.client.get(f"{path}/measurements")["items"]
        kept = self.client.get(f"{path}/checkpoints")["items"]
        return Standing(
            state=run["state"],
            attempt=run["attempt"],
            failures=run["failures"],
            val_loss_nats=run["val_loss_nats"] if run["state"] in FINAL_RUN_STATES else None,
            losses={p["step"]: p["loss_nats"] for p in points},
            checkpoints=[(c["step"], c["final"]) for c in kept],
        )


class Fake:
    """The fake service."""

    def __init__(self, fake: Any, client: Client, spec: Any) -> None:
        self.url, self.key, self.client = client.base_url, fake.key, client
        self._fake, self._spec, self._num_studies = fake, spec, 0

    def offer(self, n: int = 1, *, cpus: int = 1, gpus: float = 0.0, **more: Any) -> str:
        self._num_studies += 1
        study = f"study-{self._num_studies}"
        for _ in range(n):
            self._fake.offer(self._spec, study=study, cpus=cpus, gpus=gpus, **more)
        return study

    def offer_a_bad_one(self) -> None:
        self.offer(prune_at_evaluation=1)

    def cancel(self, lease: Any) -> None:
        self._fake.cancel(self._fake.runs[lease.run_id])

    def expire(self) -> None:
        for run in self._fake.runs.values():
            run.expires_at = 0.0

    def standing(self, lease: Any) -> Standing:
        run = self._fake.runs[lease.run_id]
        ended = run.finish if run.state in FINAL_RUN_STATES else None
        return Standing(
            state=run.state,
            attempt=run.attempt,
            failures=run.failures,
            val_loss_nats=ended and ended.val_loss_nats,
            losses={point.step: point.loss_nats for point in run.curve},
            checkpoints=[(row.report.step, row.final) for row in run.kept()],
        )
