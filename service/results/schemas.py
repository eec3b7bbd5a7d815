"""The messages that a study's results are read by. Losses in nats per token, costs in FLOPs."""

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
    ema_val_loss_nats: float | None = Field(default=None, description="of averaged weights")
    swa_val_loss_nats: float | None = Field(default=None, description="likewise")


class TargetRun(Message):
    """A target's run and its validation curve."""

    run_id: str
    launch: int = Field(default=0, description="0: the study's own targets; above: started by hand")
    rung: int = 0
    arm: Arm
    seed: int
    seed_number: int = Field(description="which of the target's seeds this is, from 0")
    branch: int = Field(default=0, description="of the trunk's budgets, from 1; 0: not a branch")
    budget: float | None = Field(default=None, description="a branch's tokens per parameter")
    is_trunk: bool = Field(default=False, description="not cooled down itself: never compared")
    trunk_id: str | None = None
    state: RunState
    diverged: bool = False
    val_loss_nats: float | None
    base_hash: str | None = None
    data_hash: str | None = Field(default=None, description="of the corpus as the worker read it")
    tokens: int
    num_tokens: int
    cost_flops: float = Field(description="of what it trained itself")
    trunk_tokens: int = Field(default=0, description="of its tokens, those that its trunk trained")
    trunk_flops: float = Field(default=0.0, description="what those cost its trunk")
    error: str | None = None
    curve: tuple[Evaluation, ...] = Field(
        default=(), description="evenly thinned to 1000 points at most; a branch's with its trunk's"
    )

    @property
    def alone_flops(self) -> float:
        """What it would have cost without a trunk to share."""
        return self.trunk_flops + self.cost_flops


class BestTrialResult(Message):
    """The trial whose parameters and checkpoint the targets are made from."""

    number: int
    run_id: str
    val_loss_nats: float
    params: dict[str, Any]
    cost_flops: float
    checkpoint: CheckpointRef | None


class Growth(Message):
    """How much larger the target is than the proxy, three ways (the literature means each)."""

    g_width: float
    g_nonembedding: float
    g_total: float


class Costs(Message):
    """What one target costs, and what led to it. None where no such run has succeeded.

    A branch costs its trunk up to where it begins and its own cooldown, though it shares the trunk.

    `warm_flops` has the base sunk: the search needed the best trial anyway.
    `warm_base_counted_flops` adds `base_flops`: the best trial's own training, and a ladder's lower
    rungs.
    """

    search_flops: float = Field(description="all trials together")
    base_flops: float | None
    warm_flops: float | None = Field(description="one warm run, mean over seeds; the base sunk")
    warm_base_counted_flops: float | None
    cold_flops: float | None = Field(description="one cold run, mean over seeds")
    targets_flops: float = Field(default=0.0, description="all of the study's own target runs")
    targets_alone_flops: float = Field(
        default=0.0, description="the same, had no two of them shared a trunk"
    )
    total_flops: float = Field(description="every run of the study")


class Interval(Message):
    """A two-sided Student-t interval."""

    low: float
    high: float
    confidence: float = 0.95


class SeedPair(Message):
    """A warm and a cold run of the same target, budget, data order and seed, both cooled down."""

    seed: int
    seed_number: int
    tokens: int = Field(description="that each of the two was trained on")
    warm_run_id: str
    cold_run_id: str
    warm_loss_nats: float
    cold_loss_nats: float
    difference_nats: float = Field(description="warm - cold: below 0, warm is better")
    tokens_to_cold_loss: float | None = Field(
        description="where warm's curve first reaches cold's final loss; None: never"
    )
    speedup: float | None = Field(description="tokens over tokens_to_cold_loss")


class Verdict(Message):
    """Whether growing paid. `grow` is true only when the whole interval lies below 0."""

    grow: bool
    sentence: str
    seeds: int
    difference_nats: float = Field(description="mean over seeds of warm - cold")
    interval_nats: Interval | None = Field(description="None from a single seed: it cannot tell")
    speedup: float | None = Field(description="in tokens; None unless every seed reached it")
    speedup_base_counted: float | None = Field(description="in FLOPs, the base's added to warm's")
    growth: Growth
    pairs: tuple[SeedPair, ...]
    left_out: tuple[str, ...] = Field(default=(), description="runs that are not judged, and why")


class BudgetResult(Message):
    """What was found at one of the target's token budgets."""

    tokens_per_param: float
    num_tokens: int | None = Field(description="None until a run of this budget was started")
    costs: Costs
    verdict: Verdict | None
    pending: str | None


class StudyResults(Message):
    """What a study found. `pending` says what is missing while `verdict` is None.

    Of several budgets `verdict`, `pending` and `costs` are the largest one's.
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
    budgets: tuple[BudgetResult, ...] = Field(default=(), description="ascending; of one: none")


class ReportTrial(Message):
    """A trial as the report draws it."""

    number: int
    run_id: str
    state: RunState
    diverged: bool
    params: dict[str, Any]
    val_loss_nats: float | None
    cost_flops: float
    error: str | None
    curve: tuple[Evaluation, ...] = ()
