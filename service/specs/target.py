"""The specs of a study's targets and warmstart, and the model and training that follow from them.

Functions here that take a `prefix` raise a FieldError for a field below it, such as `ladder.1`.
"""

from typing import Annotated, Any

from pydantic import Field, ValidationError

from warmcore.specs import (
    GrowthOptions,
    ModelSpec,
    PositiveInt,
    RunSpec,
    Spec,
    TokensPerParam,
    TrainSpec,
    growth_rules,
)
from warmcore.specs.fields import FieldError, format_reason
from warmcore.specs.sizes import count_params

MAX_TOKENS = 10**18


class TargetSpec(Spec):
    """The model that the study is for. Fields that are not given are the proxy's."""

    width: PositiveInt
    depth: PositiveInt | None = None
    train: dict[str, Any] = Field(
        default_factory=dict, description="overrides of `train`, e.g. {tokens_per_param: 10}"
    )
    budgets: Annotated[tuple[TokensPerParam, ...], Field(max_length=16)] = Field(
        default=(),
        description="tokens per parameter, ascending: one constant phase with a cooldown for each",
    )


class WarmstartSpec(GrowthOptions):
    """Growth of the best trial's checkpoint; `control` also trains the last target cold."""

    control: bool = True
    seeds: Annotated[int, Field(ge=1, le=100)] = 2


def reshape_model(base: ModelSpec, target: TargetSpec) -> ModelSpec:
    """Return `base` with the target's width and depth."""
    shape = {"width": target.width, "depth": target.depth or base.depth}
    return ModelSpec.model_validate(base.model_dump(exclude_unset=True) | shape)


def make_grown_model(
    base: ModelSpec, target: TargetSpec, options: GrowthOptions, prefix: str
) -> ModelSpec:
    """Return the target's model.

    Raises:
        FieldError: `base` cannot be grown into it.
    """
    try:
        model = reshape_model(base, target)
    except ValidationError as error:
        raise FieldError(f"{prefix}.width", target.width, format_reason(error)) from None
    try:
        growth_rules.check_depth(options, base, model)
    except ValueError as error:
        raise FieldError(f"{prefix}.depth", target.depth, str(error)) from None
    try:
        growth_rules.check_growth(options, base, model)
    except ValueError as error:
        raise FieldError(f"{prefix}.width", target.width, str(error)) from None
    return model


def override_train(train: TrainSpec, target: TargetSpec, prefix: str) -> TrainSpec:
    """Return `train` with the target's overrides.

    Raises:
        FieldError: an override is not a field of TrainSpec, or has a value that it refuses.
    """
    try:
        return TrainSpec.model_validate(train.model_dump() | target.train)
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join([f"{prefix}.train", *(str(part) for part in first["loc"])])
        raise FieldError(path, first["input"], format_reason(error)) from None


def check_trained_base(
    options: GrowthOptions, base: TrainSpec, target: TrainSpec, prefix: str
) -> None:
    """Raise a FieldError unless a target can use the optimizer state and weights of its base."""
    try:
        growth_rules.check_optimizers(options, base, target)
    except ValueError as error:
        path = f"{prefix}.train.optimizer"
        raise FieldError(path, target.optimizer, str(error)) from None
    try:
        growth_rules.check_base_weights(options, base)
    except ValueError as error:
        raise FieldError("warmstart.base_weights", options.base_weights, str(error)) from None


def check_size(run: RunSpec) -> None:
    """Raise ValueError if a run or a step of it would have more than `MAX_TOKENS` tokens."""
    # The database counts tokens in 64-bit integers, up to 9.2e18.
    tokens = run.train.num_tokens or run.train.tokens_per_param * count_params(run.model).total
    if tokens > MAX_TOKENS or run.tokens_per_step > MAX_TOKENS:
        raise ValueError(f"the run would train on {tokens:.3g} tokens; {MAX_TOKENS:.0e} at most")
