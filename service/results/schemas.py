"""Messages of a study's results. Losses are in nats per token, costs in FLOPs."""

from typing import Any

from pydantic import Field

from service.protocol import Arm, Message, RunState, StudyState
from service.studies.schemas import RunCounts
from warmcore.specs import CheckpointRef


class Evaluation(Message):
    """One point of a validation curve."""

    step: int
    tokens: int
    val_loss_nats: float
    ema_val_loss_nats: float | None = Field(
        default=None, description="loss of the EMA of the weights"
    )
    swa_val_loss_nats: float | None = Field(
        default=None, description="loss of the SWA of the weights"
    )


class TargetRun(Message):
    """A run of a target, with its validation curve."""

    run_id: str
    launch: int = Field(
        default=0, description="0: the study's own targets; above 0: started by hand"
    )
    rung: int = 0
    arm: Arm
    seed: int
    seed_number: int = Field(description="number of the seed within the target, from 0")
    branch: int = Field(
        default=0,
        description="number of the budget at which it leaves the trunk, from 1; 0: not a branch",
    )
    budget: float | None = Field(default=None, description="tokens per parameter of a branch")
    is_trunk: bool = Field(
        default=False, description="a trunk does not cool down and is never compared"
    )
    trunk_id: str | None = None
    state: RunState
    diverged: bool = False
    val_loss_nats: float | None
    base_hash: str | None = None
    data_hash: str | None = Field(
        default=None, description="hash of the corpus that the worker read"
    )
    tokens: int
    num_tokens: int
    cost_flops: float = Field(description="FLOPs of the tokens that it trained itself")
    trunk_tokens: int = Field(default=0, description="tokens that the trunk trained for a branch")
    trunk_flops: float = Field(default=0.0, description="FLOPs of the trunk for those tokens")
    error: str | None = None
    curve: tuple[Evaluation, ...] = Field(
        default=(),
        description="at most 1000 evenly spaced points; for a branch, with its trunk's points",
    )

    @property
    def alone_flops(self) -> float:
        """FLOPs of the run if no other run had shared its trunk."""
        return self.trunk_flops + self.cost_flops


class BestTrialResult(Message):
    """The best trial: the targets use its parameters, and warm targets grow from its checkpoint."""

    number: int
    run_id: str
    val_loss_nats: float
    params: dict[str, Any]
    cost_flops: float
    checkpoint: CheckpointRef | None


class Growth(Message):
    """Ratios of target to proxy: by width, non-embedding parameters and all parameters.

    Papers on growth use each of the three.
    """

    g_width: float
    g_nonembedding: float
    g_total: float


class Costs(Message):
    """FLOPs of one target run and of the search before it; None until a run of the kind succeeds.

    A branch costs the trunk up to its start and its own cooldown, as if it shared no trunk.

    `warm_flops` leaves the base out as sunk: the search needed the best trial anyway.
    `warm_base_counted_flops` adds `base_flops`: the best trial's own training, and the lower rungs
    of a ladder.
    """

    search_flops: float = Field(description="all trials together")
    base_flops: float | None
    warm_flops: float | None = Field(description="one warm run, mean over seeds; the base sunk")
    warm_base_counted_flops: float | None
    cold_flops: float | None = Field(description="one cold run, mean over seeds")
    targets_flops: float = Field(default=0.0, description="all of the study's own target runs")
    targets_alone_flops: float = Field(
        default=0.0, description="the same, as if no two runs shared a trunk"
    )
    total_flops: float = Field(description="every run of the study")


class Interval(Message):
    """A two-sided Student-t interval."""

    low: float
    high: float
    confidence: float = 0.95


class SeedPair(Message):
    """A warm and a cold run of equal target, budget, data order and seed, both cooled down."""

    seed: int
    seed_number: int
    tokens: int = Field(description="tokens that each of the two runs trained on")
    warm_run_id: str
    cold_run_id: str
    warm_loss_nats: float
    cold_loss_nats: float
    difference_nats: float = Field(description="warm - cold: below 0, warm is better")
    tokens_to_cold_loss: float | None = Field(
        description="tokens at which warm's curve first reaches cold's final loss; None: never"
    )
    speedup: float | None = Field(description="tokens divided by tokens_to_cold_loss")


class Verdict(Message):
    """The verdict on growing. `grow` is true only if the whole interval is below 0."""

    grow: bool
    sentence: str
    seeds: int
    difference_nats: float = Field(description="mean over seeds of warm - cold")
    interval_nats: Interval | None = Field(
        description="None for a single seed, which has no interval"
    )
    speedup: float | None = Field(
        description="in tokens; None unless warm reached cold's final loss in every seed"
    )
    speedup_base_counted: float | None = Field(
        description="in FLOPs, with the base added to warm's cost"
    )
    growth: Growth
    pairs: tuple[SeedPair, ...]
    left_out: tuple[str, ...] = Field(
        default=(), description="runs that the verdict does not compare, with the reasons"
    )


class BudgetResult(Message):
    """The result at one token budget of the target."""

    tokens_per_param: float
    num_tokens: int | None = Field(description="None until a run at this budget has started")
    costs: Costs
    verdict: Verdict | None
    pending: str | None


class StudyResults(Message):
    """The results of a study. While `verdict` is None, `pending` names the missing runs.

    With several budgets, `verdict`, `pending` and `costs` are of the largest budget.
    """

    study_id: str
    study_name: str
    state: StudyState
    reason: str | None
    trials_budget: int
    trials: RunCounts
    best_trial: BestTrialResult | None
    targets: tuple[TargetRun, ...]
    costs: Costs
    verdict: Verdict | None
    pending: str | None
    budgets: tuple[BudgetResult, ...] = Field(
        default=(), description="by budget, ascending; empty if the target has a single budget"
    )


class ReportTrial(Message):
    """A trial for the report, with its curve."""

    number: int
    run_id: str
    state: RunState
    diverged: bool
    params: dict[str, Any]
    val_loss_nats: float | None
    cost_flops: float
    error: str | None
    curve: tuple[Evaluation, ...] = ()
