"""One training run: model, data, training, growth, and the steps they imply (torch-free)."""

import math
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from typing import Annotated, Any, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from warmcore.specs.data import DataSpec
from warmcore.specs.fields import Seed, Spec, TokensPerParam
from warmcore.specs.growth import CheckpointRef, GrowthSpec
from warmcore.specs.model import ModelSpec
from warmcore.specs.schedule import cooldown_start, evaluation_steps, warmup_steps
from warmcore.specs.sizes import count_params, flops_per_token
from warmcore.specs.train import TrainSpec
from warmcore.specs.tunable import MODEL_PARAMS, TRAIN_PARAMS, TUNABLE_PARAMS

MAX_EVALUATIONS = 10_000


class RunSpec(Spec):
    """One training run, complete: the same spec gives the same curve, bit for bit on CPU.

    With `branches` it is a trunk: it trains the phases that runs of these budgets have in common,
    up to where the last of them cools down. With `trunk` it is one of those runs and goes on from
    the trunk's checkpoint (`warmcore.specs.branching`).
    """

    model: ModelSpec
    data: DataSpec
    train: TrainSpec = TrainSpec()
    growth: GrowthSpec | None = None
    seed: Seed = 0
    trunk: CheckpointRef | None = Field(
        default=None, description="the run so far: a trunk's checkpoint where this cools down"
    )
    branches: Annotated[tuple[TokensPerParam, ...], Field(max_length=16)] = Field(
        default=(), description="budgets, ascending, in place of train.tokens_per_param"
    )

    @field_validator("branches")
    @classmethod
    def _branches_fit(cls, branches: tuple[float, ...], info: ValidationInfo) -> tuple[float, ...]:
        """What is wrong elsewhere is told there: without those fields nothing is checked here."""
        if branches and {"model", "data", "train", "trunk"} <= info.data.keys():
            check_branches(cls.model_construct(**info.data, branches=branches))
        return branches

    @model_validator(mode="after")
    def _phases_fit(self) -> Self:
        check_phases(self)
        return self

    @property
    def start_checkpoint(self) -> CheckpointRef | None:
        """What the run starts from: its trunk, else the base that it grows from, else nothing."""
        return self.trunk or (self.growth.base if self.growth else None)

    @model_validator(mode="after")
    def _vocabularies_agree(self) -> Self:
        # Frozen for others; `model` is whole only when `data` is known.
        object.__setattr__(self, "model", self.model.for_data(self.data))
        return self

    @property
    def tokens_per_step(self) -> int:
        """Batch size times context."""
        return self.train.batch_size * self.data.context

    @property
    def budget_steps(self) -> int:
        """Optimizer steps of the (largest) token budget, rounded up, at least 1."""
        tokens_per_param = self.branches[-1] if self.branches else self.train.tokens_per_param
        tokens = self.train.num_tokens or tokens_per_param * count_params(self.model).total
        return max(1, math.ceil(tokens / self.tokens_per_step))

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the run. A trunk ends where its last branch begins to cool down."""
        total = self.budget_steps
        return cooldown_start(total, self.train) if self.branches else total

    @property
    def start_step(self) -> int:
        """Steps done when the run begins: t0 for a branch, otherwise 0."""
        return 0 if self.trunk is None else cooldown_start(self.budget_steps, self.train)

    @property
    def num_tokens(self) -> int:
        """D: the tokens that the run trains on, in whole batches."""
        return self.num_steps * self.tokens_per_step

    @property
    def train_flops(self) -> float:
        """FLOPs of the whole budget."""
        return self.flops_of(self.num_tokens)

    def flops_of(self, num_tokens: int) -> float:
        """FLOPs of training on `num_tokens` tokens."""
        return flops_per_token(self.model, self.data.context) * num_tokens

    @cached_property
    def branch_steps(self) -> tuple[int, ...]:
        """t0 of each budget of a trunk: the steps whose checkpoints the branches start from."""
        runs = [branch_of(self, budget, None) for budget in self.branches]
        return tuple(cooldown_start(run.budget_steps, run.train) for run in runs)

    @cached_property
    def evaluation_steps(self) -> tuple[int, ...]:
        """Steps at which the run is evaluated, ascending.

        A trunk is evaluated at each branch's start, and wherever a branch that is still ahead would
        have been evaluated. So each branch inherits all evaluations up to its t0.
        """
        if not self.branches:
            return tuple(evaluation_steps(self.num_steps, self.train.evaluations))
        steps = set(self.branch_steps)
        for budget, start in zip(self.branches, self.branch_steps, strict=True):
            branch = branch_of(self, budget, None)
            steps |= {step for step in branch.evaluation_steps if step <= start}
        return tuple(sorted(steps))

    def __copy__(self) -> Self:
        """Copy the fields alone: `model_copy` changes them, and the cached steps depend on them."""
        copied = super().__copy__()
        for name in ("branch_steps", "evaluation_steps"):
            vars(copied).pop(name, None)
        return copied

    def with_data(self, data: DataSpec) -> "RunSpec":
        """This run on `data`; its model takes that vocabulary unless it was given one."""
        return self.model_copy(update={"data": data, "model": self.model.for_data(data)})

    def with_params(self, params: dict[str, Any]) -> "RunSpec":
        """Return this spec with tuned hyperparameters put where they belong.

        Raises:
            ValueError: a name that is not tunable, or a value its field refuses.
        """
        unknown = sorted(set(params) - TUNABLE_PARAMS)
        if unknown:
            raise ValueError(
                f"{unknown[0]} is not tunable; one of {', '.join(sorted(TUNABLE_PARAMS))}"
            )
        model = {k: v for k, v in params.items() if k in MODEL_PARAMS}
        train = {k: v for k, v in params.items() if k in TRAIN_PARAMS}
        tuned = {
            "model": ModelSpec.model_validate(self.model.model_dump(exclude_unset=True) | model),
            "train": TrainSpec.model_validate(self.train.model_dump() | train),
        }
        fields = {name: getattr(self, name) for name in type(self).model_fields}
        return RunSpec.model_validate(fields | tuned)


def branch_of(trunk: RunSpec, tokens_per_param: float, checkpoint: CheckpointRef | None) -> RunSpec:
    """The run of one of the trunk's budgets, from `checkpoint` (None: the same run, whole).

    Raises:
        ValueError: the trunk has no such budget.
    """
    if tokens_per_param not in trunk.branches:
        works = ", ".join(f"{budget:g}" for budget in trunk.branches) or "no budget at all"
        raise ValueError(f"has no branch at {tokens_per_param:g} tokens per parameter but {works}")
    budget = {
        "tokens_per_param": tokens_per_param,
        "warmup_steps": warmup_steps(trunk.budget_steps, trunk.train),
    }
    train = trunk.train.model_copy(update=budget)
    return trunk.model_copy(update={"train": train, "trunk": checkpoint, "branches": ()})


def check_phases(run: RunSpec) -> None:
    """Raise ValueError unless a warmup that is given in steps leaves room for the cooldown."""
    total, num_warmup = run.budget_steps, run.train.warmup_steps
    rest = cooldown_start(total, run.train) if run.train.schedule == "wsd" else total
    if num_warmup is not None and num_warmup > rest:
        raise ValueError(
            f"train.warmup_steps {num_warmup}: the run of {total} steps has {rest} before its "
            f"cooldown; {rest} or fewer work"
        )


def check_branches(trunk: RunSpec) -> None:
    """Raise ValueError unless each budget has a cooldown that starts at a step of its own."""
    _check_budgets(trunk.branches)
    train = trunk.train
    if trunk.trunk is not None:
        raise ValueError("a run that has a trunk is a branch itself; give one of the two")
    if train.num_tokens is not None:
        raise ValueError(f"train.num_tokens {train.num_tokens} is a budget too; leave it out")
    if train.schedule != "wsd" or not train.cooldown_fraction:
        raise ValueError(
            f"train.schedule {train.schedule} with cooldown_fraction {train.cooldown_fraction:g} "
            "cannot branch; wsd with a cooldown_fraction above 0 can"
        )
    if train.swa_fraction is not None and train.swa_fraction > train.cooldown_fraction:
        raise ValueError(
            f"train.swa_fraction {train.swa_fraction:g} would begin before the cooldown of its "
            f"branch; {train.cooldown_fraction:g} or less works"
        )
    if trunk.train.evaluations * len(trunk.branches) > MAX_EVALUATIONS:
        most = MAX_EVALUATIONS // len(trunk.branches)
        raise ValueError(f"train.evaluations {train.evaluations}: {most} at most for a trunk")
    _check_steps(trunk)


def _check_budgets(branches: Sequence[float]) -> None:
    if len(branches) == 1:
        raise ValueError(
            f"one budget needs no trunk; give two, or train.tokens_per_param {branches[0]:g}"
        )
    if any(a >= b for a, b in pairwise(branches)):
        works = ", ".join(f"{budget:g}" for budget in sorted(set(branches)))
        raise ValueError(f"budgets must ascend, none twice; [{works}] would")


def _check_steps(trunk: RunSpec) -> None:
    steps = trunk.branch_steps
    num_warmup = warmup_steps(trunk.budget_steps, trunk.train)
    if steps[0] < max(1, num_warmup):
        raise ValueError(
            f"{trunk.branches[0]:g} tokens per parameter would cool down from step {steps[0]}, in "
            f"the warmup of {num_warmup} steps; a larger budget or a shorter warmup would work"
        )
    for (a, b), (x, y) in zip(pairwise(steps), pairwise(trunk.branches), strict=True):
        if a >= b:
            raise ValueError(
                f"{x:g} and {y:g} tokens per parameter would cool down from the same step {a}; "
                "budgets further apart, or a smaller train.batch_size, would work"
            )
