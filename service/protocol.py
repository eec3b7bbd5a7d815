"""The wire messages between workers and the service (v1); no FastAPI, no SQLAlchemy."""

import hashlib
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from warmcore.specs import CheckpointRef, RunSpec, Strategy

RunKind = Literal["trial", "target"]
Arm = Literal["warm", "cold"]
Decision = Literal["continue", "prune", "cancel"]
# `diverged`: the loss was not finite, or stayed above its start. `released`: the fleet was drained.
Outcome = Literal["succeeded", "pruned", "diverged", "failed", "released"]
RunState = Literal["queued", "leased", "succeeded", "pruned", "failed", "cancelled"]
StudyState = Literal["active", "paused", "completed", "cancelled", "failed"]
# `work` is for fleets, `metrics` for Prometheus; `admin` includes every other scope.
Scope = Literal["read", "write", "work", "metrics", "admin"]

LEASE_TOKEN_HEADER = "Lease-Token"  # noqa: S105 - a header's name
TRACE_HEADER = "traceparent"
PROJECT_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,62}$"
IDEMPOTENCY_HEADER = "Idempotency-Key"
REQUEST_ID_HEADER = "X-Request-ID"


def _require_number(value: object) -> object:
    """Refuse `"3"` and `true`, which pydantic would convert; accept 3.0, an integer in JSON."""
    if isinstance(value, bool | str):
        raise ValueError(f"a number, not {value!r}")  # noqa: TRY004 - pydantic expects ValueError
    return value


Number = BeforeValidator(_require_number)
# PostgreSQL text cannot hold NUL. Reject it here: a NUL in a worker's name used to fail only when
# the lease was written, and that failed the whole study.
_STORABLE = r"^[^\x00]*$"
Finite = Annotated[float, Field(strict=True, allow_inf_nan=False)]
# Readers of JSON that use floats, JavaScript for example, are exact up to 2**53.
Count = Annotated[int, Field(ge=0, le=2**53), Number]
NonNegative = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]


def traceparent(run_id: str) -> str:
    """Return the header that puts a request into its run's trace (W3C Trace Context).

    The ids are a hash of the run's id: all processes name the same trace without asking each other.
    """
    digest = hashlib.sha256(run_id.encode()).hexdigest()
    return f"00-{digest[:32]}-{digest[32:48]}-01"


class Message(BaseModel):
    """The base class of messages: immutable, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Resources(Message):
    """The resources of a run, summed over its processes, or the free resources of a fleet.

    GPUs may be fractional.
    """

    cpus: Annotated[int, Field(ge=0, le=4096), Number] = 1
    gpus: Annotated[float, Field(strict=True, ge=0, le=1024, allow_inf_nan=False)] = 0.0
    processes: Annotated[int, Field(ge=1, le=1024), Number] | None = Field(
        default=None,
        description="processes of the run, on the same machine; None: a process per GPU",
    )
    strategy: Strategy = Field(
        default="ddp", description="for several processes: fsdp shards the model, ddp does not"
    )

    @property
    def num_processes(self) -> int:
        """The number of processes that train the run together."""
        return self.processes or max(1, int(self.gpus))

    def fits(self, free: "Resources") -> bool:
        """Return whether these resources fit into the free ones."""
        return self.cpus <= free.cpus and self.gpus <= free.gpus

    def subtract(self, used: "Resources") -> "Resources":
        """Return these resources minus the used ones."""
        # Rounded to 1/10000, the unit in which Ray counts: 1 - 0.9 is otherwise less than 0.1.
        gpus = max(0.0, round(self.gpus - used.gpus, 4))
        return self.model_copy(update={"cpus": self.cpus - used.cpus, "gpus": gpus})


class LeaseRequest(Message):
    """Ask for up to `max_runs` runs that together fit `resources`; wait up to `wait_seconds`."""

    worker: str = Field(min_length=1, max_length=200, pattern=_STORABLE)
    resources: Resources = Resources()
    max_runs: Annotated[int, Field(ge=1, le=64), Number] = 1
    # An external worker asks for a single study, a fleet for any. Both use the same call.
    study: str | None = Field(
        default=None, pattern=_STORABLE, description="name or id; None: runs of any study"
    )
    kinds: tuple[RunKind, ...] | None = None
    wait_seconds: Annotated[float, Field(strict=True, ge=0, le=60, allow_inf_nan=False)] = 0.0


class Lease(Message):
    """A leased run. `lease_token` is valid until another attempt replaces it."""

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
    artifact_uri: str = Field(description="the folder of this attempt's checkpoints")
    # A list, because the furthest checkpoint may be damaged: the worker then takes the next.
    resume_from: tuple[CheckpointRef, ...] = Field(
        description="complete checkpoints, the furthest first"
    )
    reported_step: int = Field(
        description="the last step with a measurement; 0 without measurements"
    )


class LeaseReply(Message):
    """The leased runs; empty if no run fitted within `wait_seconds`."""

    leases: tuple[Lease, ...]


class Measurement(Message):
    """A point of a curve. Losses are in nats per token.

    `train_seconds` is the time inside train steps since the point before.
    """

    step: Count
    tokens: Count
    loss_nats: Finite | None = None
    val_loss_nats: Finite | None = None
    ema_val_loss_nats: Finite | None = Field(
        default=None,
        description="loss of the exponential average of the weights, if the run keeps it",
    )
    swa_val_loss_nats: Finite | None = Field(
        default=None, description="loss of the equal average of the last weights, once it has begun"
    )
    evaluation: Annotated[int, Field(ge=1, le=10_000), Number] | None = Field(
        default=None, description="number of this evaluation within the run; the pruner's resource"
    )
    lr: NonNegative | None = None
    grad_norm: NonNegative | None = None
    tokens_per_second: NonNegative | None = None
    train_seconds: NonNegative | None = None


class MeasurementBatch(Message):
    """Points to add; an empty batch only renews the lease."""

    # A longer batch is a 422. A worker that was offline for hours sends several batches.
    measurements: Annotated[tuple[Measurement, ...], Field(max_length=1000)] = ()


class ReportReply(Message):
    """The answer to a report: whether the worker continues."""

    decision: Decision


class CheckpointReport(Message):
    """A complete checkpoint to publish; its files are already in place."""

    step: Count
    tokens: Count
    uri: str = Field(min_length=1, max_length=2000)
    hash: str = Field(pattern=r"^[0-9a-f]{64}$")
    num_bytes: Count
    val_loss_nats: Finite | None = None
    final: bool = False


class CheckpointReply(ReportReply):
    """The answer to a checkpoint.

    No run needs the `superseded` checkpoints of this run any more: the worker deletes their files.
    """

    superseded: tuple[str, ...] = ()


class Provenance(Message):
    """The software, data and machine of a run: recorded, never interpreted."""

    warmscale_version: str
    code_hash: str | None = Field(default=None, description="SHA-256 of warmcore's source text")
    packages: dict[str, str] = Field(default_factory=dict)
    data_hash: str | None = None
    base_hash: str | None = Field(
        default=None, description="hash of the base checkpoint that was loaded"
    )
    device: str | None = None
    num_threads: int | None = Field(default=None, description="threads of each process")
    processes: int = 1
    strategy: Strategy | None = Field(default=None, description="None: one process")
    hostname: str | None = None


class Timing(Message):
    """Times of this attempt on the worker's clock."""

    first_step_at: float | None = Field(default=None, description="epoch seconds")
    last_step_at: float | None = Field(default=None, description="epoch seconds")
    startup_seconds: NonNegative | None = Field(
        default=None, description="from the lease to the first step"
    )
    train_seconds: NonNegative = Field(default=0.0, description="inside train steps")


class FinishRequest(Message):
    """The end of an attempt. `released` queues the run again without counting a failure (drain)."""

    outcome: Outcome
    val_loss_nats: Finite | None = None
    error: str | None = Field(default=None, max_length=20_000)
    retryable: bool = True
    provenance: Provenance | None = None
    timing: Timing | None = None


class FinishReply(Message):
    """The state of the run after its attempt has ended."""

    state: RunState
