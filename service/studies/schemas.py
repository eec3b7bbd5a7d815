"""The messages of the routes that read and change studies."""

from datetime import datetime
from typing import Annotated, Any

from pydantic import Field

from service.protocol import Message, Number, RunState, StudyState
from service.runs.schemas import RunView
from service.specs.study import StudySpec
from service.specs.target import TargetSpec, WarmstartSpec
from warmcore.specs import ModelSpec


class RunCounts(Message):
    """Runs by state."""

    queued: int = 0
    leased: int = 0
    succeeded: int = 0
    pruned: int = 0
    failed: int = 0
    cancelled: int = 0


class BestTrial(Message):
    """The succeeded trial with the lowest validation loss."""

    number: int
    run_id: str
    val_loss_nats: float
    params: dict[str, Any]


class StudyView(Message):
    """A study with its counts, its best trial and its cost so far."""

    id: str
    project: str
    name: str
    state: StudyState
    reason: str | None
    trials: RunCounts
    targets: RunCounts
    trials_budget: int
    best_trial: BestTrial | None
    progress: float = Field(description="finished runs, as a share of all runs that the spec needs")
    cost_flops: float
    warnings: tuple[str, ...]
    spec: StudySpec
    created_at: datetime
    finished_at: datetime | None


class StudyPage(Message):
    """A page of studies; pass `next_cursor` as `cursor` for the next."""

    items: tuple[StudyView, ...]
    next_cursor: str | None


class TrialView(Message):
    """A trial: its parameters, its value and its state."""

    number: int
    run_id: str | None
    state: RunState
    diverged: bool = False
    params: dict[str, Any]
    val_loss_nats: float | None
    step: int
    num_steps: int
    attempt: int
    error: str | None


class EnqueueRequest(Message):
    """Parameters to try next; parameters that are not given are sampled."""

    params: Annotated[dict[str, Any], Field(min_length=1)]


RowNumber = Annotated[int, Field(ge=0, lt=2**31), Number]


class ImportedBase(Message):
    """A model that was trained elsewhere, as `warmscale import --json` prints it."""

    uri: str = Field(min_length=1)
    hash: str = Field(pattern=r"^[0-9a-f]{64}$")
    model: ModelSpec


class TargetRequest(Message):
    """A target to start by hand, and the trial, checkpoint or imported model to grow."""

    trial: RowNumber | None = Field(default=None, description="trial number; None: the best trial")
    checkpoint: RowNumber | None = Field(
        default=None, description="checkpoint id, instead of a trial"
    )
    base: ImportedBase | None = Field(
        default=None,
        description="imported model, instead of a trial; trained with the best trial's parameters",
    )
    target: TargetSpec
    warmstart: WarmstartSpec | None = Field(default=None, description="None: the study's")


class TrialPage(Message):
    """A page of trials by number; pass `next_cursor` as `cursor` for the next."""

    items: tuple[TrialView, ...]
    next_cursor: str | None


class TargetList(Message):
    """The target runs that were started."""

    items: tuple[RunView, ...]


class Importance(Message):
    """Share of each parameter in the variance of the loss; they sum to about 1."""

    importance: dict[str, float]
    trials: int = Field(description="number of finished trials used")
