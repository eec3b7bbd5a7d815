"""A training run: model, data, training, growth, and the steps they imply (torch-free).

A run may be a trunk or a branch: `warmcore.specs.branching` explains both and has the rules.
"""

import math
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from warmcore.specs.branching import check_budgets, check_cooldown_starts, check_trunk_train
from warmcore.specs.data import DataSpec
from warmcore.specs.fields import Seed, Spec, TokensPerParam
from warmcore.specs.growth import CheckpointRef, GrowthSpec
from warmcore.specs.model import ModelSpec
from warmcore.specs.schedule import cooldown_start, count_warmup_steps, spread_evaluations
from warmcore.specs.sizes import count_params, flops_per_token
from warmcore.specs.train import TrainSpec
from warmcore.specs.tunable import MODEL_PARAMS, TRAIN_PARAMS, TUNABLE_PARAMS


class RunSpec(Spec):
    """A complete training run: the same spec gives the same curve, bit for bit on a CPU.

    With `branches` the run is a trunk: it trains the phase that the runs of these budgets share.
    With `trunk` it is a branch: it continues from the trunk's checkpoint.
    """

    model: ModelSpec
    data: DataSpec
    train: TrainSpec = TrainSpec()
    growth: GrowthSpec | None = None
    seed: Seed = 0
    trunk: CheckpointRef | None = Field(
        default=None,
        description="a trunk's checkpoint at the step where this run begins to cool down",
    )
    branches: Annotated[tuple[TokensPerParam, ...], Field(max_length=16)] = Field(
        default=(), description="budgets, ascending, in place of train.tokens_per_param"
    )

    if TYPE_CHECKING:  # pydantic adds it to frozen models, and pyright does not see that

        def __hash__(self) -> int: ...

    @field_validator("branches")
    @classmethod
    def _check_branches(
        cls, branches: tuple[float, ...], info: ValidationInfo
    ) -> tuple[float, ...]:
        """Check the budgets, unless a field before is invalid: pydantic reports that field."""
        if branches and {"model", "data", "train", "trunk"} <= info.data.keys():
            _check_trunk(cls.model_construct(**info.data, branches=branches))
        return branches

    @model_validator(mode="after")
    def _check_phases(self) -> Self:
        _check_warmup(self)
        return self

    @property
    def start_checkpoint(self) -> CheckpointRef | None:
        """The checkpoint of the trunk or of the base of growth; None for a start from scratch."""
        return self.trunk or (self.growth.base if self.growth else None)

    @model_validator(mode="after")
    def _take_vocabulary(self) -> Self:
        # `data` is a later field than `model`: no validator of `model` can see it. For other code
        # the spec is frozen.
        object.__setattr__(self, "model", self.model.for_data(self.data))
        return self

    @property
    def tokens_per_step(self) -> int:
        """Batch size times context."""
        return self.train.batch_size * self.data.context

    @property
    def budget_steps(self) -> int:
        """Optimizer steps of the token budget (a trunk's largest), rounded up, at least 1."""
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
        """D: tokens that the run trains on, in whole batches."""
        return self.num_steps * self.tokens_per_step

    @property
    def train_flops(self) -> float:
        """FLOPs of the whole budget."""
        return self.count_flops(self.num_tokens)

    def count_flops(self, num_tokens: int) -> float:
        """Return the FLOPs of training on `num_tokens` tokens."""
        return flops_per_token(self.model, self.data.context) * num_tokens

    @property
    def branch_steps(self) -> tuple[int, ...]:
        """t0 of each budget of a trunk: the steps whose checkpoints the branches start from."""
        return _find_branch_steps(self)

    @property
    def evaluation_steps(self) -> tuple[int, ...]:
        """Steps at which the run is evaluated, ascending.

        A trunk is evaluated at each t0, and before a t0 at each step of that branch's evaluations.
        Each branch therefore inherits all evaluations up to its t0.
        """
        return _find_evaluation_steps(self)

    def with_data(self, data: DataSpec) -> "RunSpec":
        """Return this run on `data`, with that vocabulary unless the model was given another."""
        return self.model_copy(update={"data": data, "model": self.model.for_data(data)})

    def with_params(self, params: dict[str, Any]) -> "RunSpec":
        """Return this spec with hyperparameters of the search in `model` and `train`.

        Raises:
            ValueError: a name is not tunable, or a field refuses the value.
        """
        unknown = sorted(set(params) - TUNABLE_PARAMS)
        if unknown:
            raise ValueError(
                f"{unknown[0]} is not tunable; one of {', '.join(sorted(TUNABLE_PARAMS))}"
            )
        model = {k: v for k, v in params.items() if k in MODEL_PARAMS}
        train = {k: v for k, v in params.items() if k in TRAIN_PARAMS}
        # Validate again: a value may fit the field and contradict another field. Without
        # `exclude_unset` the default vocabulary would count as given, and a tokenizer.json that is
        # read later could not set it.
        tuned = {
            "model": ModelSpec.model_validate(self.model.model_dump(exclude_unset=True) | model),
            "train": TrainSpec.model_validate(self.train.model_dump() | train),
        }
        fields = {name: getattr(self, name) for name in type(self).model_fields}
        return RunSpec.model_validate(fields | tuned)


# Training reads the steps at every step of a run. They are cached beside the specs and not in them:
# a value in an instance would show in `dict(run)` and in pickles, and `model_copy` would keep it.
@lru_cache(maxsize=64)
def _find_branch_steps(trunk: RunSpec) -> tuple[int, ...]:
    runs = [make_branch(trunk, budget, None) for budget in trunk.branches]
    return tuple(cooldown_start(run.budget_steps, run.train) for run in runs)


@lru_cache(maxsize=64)
def _find_evaluation_steps(run: RunSpec) -> tuple[int, ...]:
    if not run.branches:
        return tuple(spread_evaluations(run.num_steps, run.train.evaluations))
    steps = set(run.branch_steps)
    for budget, start in zip(run.branches, run.branch_steps, strict=True):
        branch = make_branch(run, budget, None)
        steps |= {step for step in branch.evaluation_steps if step <= start}
    return tuple(sorted(steps))


def make_branch(
    trunk: RunSpec, tokens_per_param: float, checkpoint: CheckpointRef | None
) -> RunSpec:
    """Return the run of a trunk's budget: from `checkpoint`, or without a trunk if that is None.

    Raises:
        ValueError: the trunk has no such budget.
    """
    if tokens_per_param not in trunk.branches:
        works = ", ".join(f"{budget:g}" for budget in trunk.branches) or "no budget at all"
        raise ValueError(f"has no branch at {tokens_per_param:g} tokens per parameter but {works}")
    # The warmup of the largest budget, in steps: a fraction of this budget would be another warmup.
    budget = {
        "tokens_per_param": tokens_per_param,
        "warmup_steps": count_warmup_steps(trunk.budget_steps, trunk.train),
    }
    train = trunk.train.model_copy(update=budget)
    return trunk.model_copy(update={"train": train, "trunk": checkpoint, "branches": ()})


def _check_warmup(run: RunSpec) -> None:
    """Raise ValueError unless a warmup that is given in steps leaves room for the cooldown."""
    total, num_warmup = run.budget_steps, run.train.warmup_steps
    rest = cooldown_start(total, run.train) if run.train.schedule == "wsd" else total
    if num_warmup is not None and num_warmup > rest:
        raise ValueError(
            f"train.warmup_steps {num_warmup}: the run of {total} steps has {rest} before its "
            f"cooldown; {rest} or fewer work"
        )


def _check_trunk(trunk: RunSpec) -> None:
    """Raise ValueError unless the run can be a trunk and each cooldown starts at another step."""
    check_budgets(trunk.branches)
    if trunk.trunk is not None:
        raise ValueError("a run that has a trunk is a branch itself; give one of the two")
    check_trunk_train(trunk.train, len(trunk.branches))
    num_warmup = count_warmup_steps(trunk.budget_steps, trunk.train)
    check_cooldown_starts(trunk.branches, trunk.branch_steps, num_warmup)
