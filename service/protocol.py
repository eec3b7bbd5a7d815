"""The wire messages between workers and the service (v1); neither FastAPI nor SQLAlchemy here."""

import hashlib
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from warmcore.specs import CheckpointRef, RunSpec, Strategy

RunKind = Literal["trial", "target"]
Arm = Literal["warm", "cold"]
Decision = Literal["continue", "prune", "cancel"]
Outcome = Literal["succeeded", "pruned", "diverged", "failed", "released"]
RunState = Literal["queued", "leased", "succeeded", "pruned", "failed", "cancelled"]
StudyState = Literal["active", "paused", "completed", "cancelled", "failed"]
Scope = Literal["read", "write", "work", "metrics", "admin"]

LEASE_TOKEN_HEADER = "Lease-Token"  # noqa: S105 - a header's name
TRACE_HEADER = "traceparent"
PROJECT_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,62}$"
IDEMPOTENCY_HEADER = "Idempotency-Key"
REQUEST_ID_HEADER = "X-Request-ID"


def _number(value: object) -> object:
    """Not "3" and not true, which pydantic would take; 3.0 is a whole number, as JSON has it."""
    if isinstance(value, bool | str):
        raise ValueError(f"a number, not {value!r}")  # noqa: TRY004 - pydantic hears ValueError
    return value


Number = BeforeValidator(_number)
# PostgreSQL stores no NUL: heard of late, in a worker's name, it ended the study to be leased from.
_STORABLE = r"^[^\x00]*$"
Finite = Annotated[float, Field(strict=True, allow_inf_nan=False)]
# Up to where every reader of JSON is exact.
Count = Annotated[int, Field(ge=0, le=2**53), Number]
NonNegative = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]


def traceparent(run_id: str) -> str:
    """The trace of a run as W3C Trace Context has it: the same from whoever tells of the run."""
    digest = hashlib.sha256(run_id.encode()).hexdigest()
    return f"00-{digest[:32]}-{digest[32:48]}-01"


class Message(BaseModel):
    """Immutable; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Resources(Message):
    """What a run needs, all its processes together, or a fleet has free. GPUs may be fractional."""

    cpus: Annotated[int, Field(ge=0, le=4096), Number] = 1
    gpus: Annotated[float, Field(strict=True, ge=0, le=1024, allow_inf_nan=False)] = 0.0
    processes: Annotated[int, Field(ge=1, le=1024), Number] | None = Field(
        default=None, description="that share the run, on one machine; None: one for every GPU"
    )
    strategy: Strategy = Field(
        default="ddp", description="of several processes: fsdp shards the model, ddp does not"
    )

    @property
    def num_processes(self) -> int:
        """Processes that share the run."""
        return self.processes or max(1, int(self.gpus))

    def fits(self, free: "Resources") -> bool:
        """Whether these fit into what is free."""
        return self.cpus <= free.cpus and self.gpus <= free.gpus

    def subtract(self, used: "Resources") -> "Resources":
        """What is left of these; GPU shares are rounded as Ray counts them."""
        gpus = max(0.0, round(self.gpus - used.gpus, 4))
        return self.model_copy(update={"cpus": self.cpus - used.cpus, "gpus": gpus})


class LeaseRequest(Message):
    """Ask for up to `max_runs` runs that together fit `resources`; wait up to `wait_seconds`."""

    worker: str = Field(min_length=1, max_length=200, pattern=_STORABLE)
    resources: Resources = Resources()
    max_runs: Annotated[int, Field(ge=1, le=64), Number] = 1
    study: str | None = Field(
        default=None, pattern=_STORABLE, description="name or id; None takes from any"
    )
    kinds: tuple[RunKind, ...] | None = None
    wait_seconds: Annotated[float, Field(strict=True, ge=0, le=60, allow_inf_nan=False)] = 0.0


class Lease(Message):
    """One leased run. `lease_token` is good until another attempt replaces it."""

    run_id: str
    study_id: str
    study_name: str
    kind: RunKind
    trial_number: int | None
    arm: Arm | None
    attempt: int
    lease_token: str = Field(repr=False)
    lease_seconds: float
    spec: RunSpec
    params: dict[str, Any]
    resources: Resources
    artifact_uri: str = Field(description="where this attempt's checkpoints go")
    resume_from: tuple[CheckpointRef, ...] = Field(
        description="complete checkpoints, the furthest first"
    )
    reported_step: int = Field(description="last step whose measurement stands; 0 for none")


class LeaseReply(Message):
    """The runs that were leased; empty when none fitted within `wait_seconds`."""

    leases: tuple[Lease, ...]


class Measurement(Message):
    """One point of a curve. Losses in nats per token; `train_seconds` in steps since the last."""

    step: Count
    tokens: Count
    loss_nats: Finite | None = None
    val_loss_nats: Finite | None = None
    ema_val_loss_nats: Finite | None = Field(
        default=None, description="of the exponential average of the weights, where one is kept"
    )
    swa_val_loss_nats: Finite | None = Field(
        default=None, description="of the equal average of the last weights, once it has begun"
    )
    evaluation: Annotated[int, Field(ge=1, le=10_000), Number] | None = Field(
        default=None, description="which evaluation of the run this is; the pruner's resource"
    )
    lr: NonNegative | None = None
    grad_norm: NonNegative | None = None
    tokens_per_second: NonNegative | None = None
    train_seconds: NonNegative | None = None


class MeasurementBatch(Message):
    """Points to add; none at all just renews the lease."""

    measurements: Annotated[tuple[Measurement, ...], Field(max_length=1000)] = ()


class ReportReply(Message):
    """What the worker should do next."""

    decision: Decision


class CheckpointReport(Message):
    """A complete checkpoint, already in place, to be published."""

    step: Count
    tokens: Count
    uri: str = Field(min_length=1, max_length=2000)
    hash: str = Field(pattern=r"^[0-9a-f]{64}$")
    num_bytes: Count
    val_loss_nats: Finite | None = None
    final: bool = False


class CheckpointReply(ReportReply):
    """`superseded` are checkpoints of this run that nothing needs any more: delete their files."""

    superseded: tuple[str, ...] = ()


class Provenance(Message):
    """What the run was made with: recorded, never interpreted."""

    warmscale_version: str
    code_hash: str | None = Field(default=None, description="SHA-256 of warmcore's source text")
    packages: dict[str, str] = Field(default_factory=dict)
    data_hash: str | None = None
    base_hash: str | None = Field(default=None, description="hash of the base checkpoint as loaded")
    device: str | None = None
    num_threads: int | None = Field(default=None, description="of each process")
    processes: int = 1
    strategy: Strategy | None = Field(default=None, description="None: one process")
    hostname: str | None = None


class Timing(Message):
    """Seconds on the worker's clock, of this attempt."""

    first_step_at: float | None = Field(default=None, description="epoch seconds")
    last_step_at: float | None = Field(default=None, description="epoch seconds")
    startup_seconds: NonNegative | None = Field(default=None, description="lease to first step")
    train_seconds: NonNegative = Field(default=0.0, description="inside train steps")


class FinishRequest(Message):
    """How an attempt ended. `released` gives the run back unharmed (drain)."""

    outcome: Outcome
    val_loss_nats: Finite | None = None
    error: str | None = Field(default=None, max_length=20_000)
    retryable: bool = True
    provenance: Provenance | None = None
    timing: Timing | None = None


class FinishReply(Message):
    """The run's state after this."""

    state: RunState


class RunView(Message):
    """A run as it is read."""

    id: str
    study_id: str
    study_name: str
    kind: RunKind
    state: RunState
    trial_number: int | None
    arm: Arm | None
    rung: int
    seed: int
    branch: int = Field(default=0, description="of the trunk's budgets, from 1; 0: not a branch")
    trunk_id: str | None = Field(default=None, description="the run that a branch goes on from")
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
    cost_flops: float = Field(description="of what the run trained itself, without its trunk")
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
