"""Runs of the fake service, with everything that workers sent."""

import dataclasses
import time
from typing import NamedTuple

from service.lifecycle import retry_delay_seconds, state_after_attempt
from service.protocol import (
    CheckpointReport,
    FinishRequest,
    Lease,
    Measurement,
    Resources,
    RunKind,
    RunState,
)
from warmcore.specs import CheckpointRef, RunSpec

_KEPT = 2


class Batch(NamedTuple):
    """Measurements of a single request."""

    at: float
    attempt: int
    measurements: tuple[Measurement, ...]


@dataclasses.dataclass(kw_only=True)
class Published:
    """A published checkpoint of an attempt."""

    attempt: int
    report: CheckpointReport
    final: bool
    superseded: bool = False


@dataclasses.dataclass(kw_only=True)
class Run:
    """A run, and all messages about it in the order of arrival."""

    id: str
    number: int
    spec: RunSpec
    resources: Resources
    artifact_root: str
    study: str = "study"
    kind: RunKind = "trial"
    lease_seconds: float = 30.0
    max_attempts: int = 3
    prune_at_evaluation: int | None = None

    state: RunState = "queued"
    attempt: int = 0
    failures: int = 0
    token: str | None = None
    available_at: float = 0.0
    expires_at: float = 0.0
    leased_at: float | None = None
    lease: Lease | None = None
    batches: list[Batch] = dataclasses.field(default_factory=list)
    published: list[Published] = dataclasses.field(default_factory=list)
    finish: FinishRequest | None = None
    finished_at: float | None = None

    @property
    def curve(self) -> list[Measurement]:
        """The first measurement of each step, sorted by step."""
        first: dict[int, Measurement] = {}
        for batch in self.batches:
            for point in batch.measurements:
                first.setdefault(point.step, point)
        return [first[step] for step in sorted(first)]

    @property
    def checkpoints(self) -> list[CheckpointReport]:
        return [row.report for row in self.published]

    def kept(self) -> list[Published]:
        """Return the kept checkpoints, the furthest first."""
        kept = [row for row in self.published if not row.superseded]
        return sorted(kept, key=lambda row: (row.report.step, row.attempt), reverse=True)

    def push_out(self) -> tuple[str, ...]:
        """Supersede the oldest checkpoint unless it is final or among the newest two."""
        newest = sorted(self.published, key=lambda row: (row.attempt, row.report.step))[::-1]
        old = [row for row in newest[_KEPT:][:1] if not row.final]
        for row in old:
            row.superseded = True
        return tuple(row.report.uri for row in old)

    def next_lease(self) -> Lease:
        """Lease the run in any state; the lease before becomes stale."""
        self.state, self.attempt = "leased", self.attempt + 1
        self.token = f"token-{self.number}-{self.attempt}"
        self.renew()
        self.leased_at = time.monotonic()
        self.lease = Lease(
            run_id=self.id,
            study_id=self.study,
            study_name=self.study,
            kind=self.kind,
            trial_number=self.number if self.kind == "trial" else None,
            arm=None,
            attempt=self.attempt,
            lease_token=self.token,
            lease_seconds=self.lease_seconds,
            spec=self.spec,
            params={},
            resources=self.resources,
            artifact_uri=f"{self.artifact_root}/{self.id}/attempt-{self.attempt:03d}",
            resume_from=tuple(
                CheckpointRef(uri=row.report.uri, hash=row.report.hash) for row in self.kept()
            ),
            reported_step=max((point.step for point in self.curve), default=0),
        )
        return self.lease

    def renew(self) -> None:
        self.expires_at = time.monotonic() + self.lease_seconds

    def end(self, finish: FinishRequest) -> None:
        """End an attempt by the service's state table."""
        self.finish, self.finished_at = finish, time.monotonic()
        self.failures += finish.outcome == "failed"
        self.state = state_after_attempt(
            finish.outcome,
            retryable=finish.retryable,
            failures=self.failures,
            max_attempts=self.max_attempts,
        )
        if self.state == "queued":
            self.token = None
            delay = retry_delay_seconds(self.failures) if finish.outcome == "failed" else 0.0
            self.available_at = time.monotonic() + delay
