"""The messages of the routes that read runs."""

from datetime import datetime
from typing import Any

from pydantic import Field

from service.protocol import Arm, Measurement, Message, Provenance, RunKind, RunState, Timing
from warmcore.specs import RunSpec


class RunView(Message):
    """A run, as the API shows it."""

    id: str
    study_id: str
    study_name: str
    kind: RunKind
    state: RunState
    trial_number: int | None
    arm: Arm | None
    rung: int
    seed: int
    branch: int = Field(
        default=0, description="number of the trunk's budget, from 1; 0: not a branch"
    )
    trunk_id: str | None = Field(default=None, description="the run that a branch continues")
    attempt: int
    failures: int
    max_attempts: int
    worker: str | None
    step: int
    num_steps: int
    tokens: int
    num_tokens: int
    loss_nats: float | None
    val_loss_nats: float | None
    tokens_per_second: float | None
    cost_flops: float = Field(description="FLOPs of this run's own training, without its trunk's")
    error: str | None
    base_hash: str | None
    params: dict[str, Any]
    spec: RunSpec
    provenance: Provenance | None
    timing: Timing | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None


class CheckpointView(Message):
    """A published checkpoint."""

    id: int
    run_id: str
    attempt: int
    step: int
    tokens: int
    uri: str
    hash: str
    num_bytes: int
    val_loss_nats: float | None
    final: bool
    created_at: datetime


class RunPage(Message):
    """A page of runs; pass `next_cursor` as `cursor` for the next."""

    items: tuple[RunView, ...]
    next_cursor: str | None


class MeasurementView(Measurement):
    """A point of a curve, and the attempt that reported it."""

    attempt: int


class MeasurementPage(Message):
    """A page of a run's curve, by step; pass `next_cursor` as `cursor` for the next."""

    items: tuple[MeasurementView, ...]
    next_cursor: str | None


class CheckpointList(Message):
    """A run's checkpoints that are kept, newest first."""

    items: tuple[CheckpointView, ...]
