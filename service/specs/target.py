"""Target and warmstart of a study: their specs, and a target's model and training from a base's."""

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
from warmcore.specs.fields import FieldError, reason
from warmcore.specs.sizes import count_params

MAX_TOKENS = 10**18


class TargetSpec(Spec):
    """What the study is for. What is not given is the proxy's."""

    width: PositiveInt
    depth: PositiveInt | None = None
    train: dict[str, Any] = Field(
        default_factory=dict, description="overrides of `train`, e.g. {tokens_per_param: 10}"
    )
    budgets: Annotated[tuple[TokensPerParam, ...], Field(max_length=16)] = Field(
        default=(),
        description="tokens per parameter, ascending: one constant phase, cooled down at each",
    )


class WarmstartSpec(GrowthOptions):
    """Growth of the best trial's checkpoint; `control` also trains every target cold."""

    control: bool = True
    seeds: Annotated[int, Field(ge=1, le=100)] = 2


def reshape_model(base: ModelSpec, target: TargetSpec) -> ModelSpec:
    """`base` with the target's width and depth."""
    shape = {"width": target.width, "depth": target.depth or base.depth}
    return ModelSpec.model_validate(base.model_dump(exclude_unset=True) | shape)


def make_grown_model(
    base: ModelSpec, target: TargetSpec, options: GrowthOptions, place: str
) -> ModelSpec:
    """The target's model, if `base` can be grown into it; else a FieldError below `place`."""
    try:
        model = reshape_model(base, target)
    except ValidationError as error:
        raise FieldError(f"{place}.width", target.width, reason(error)) from None
    try:
        growth_rules.check_depth(options, base, model)
    except ValueError as error:
        raise FieldError(f"{place}.depth", target.depth, str(error)) from None
    try:
        growth_rules.check(options, base, model)
    except ValueError as error:
        raise FieldError(f"{place}.width", target.width, str(error)) from None
    return model


def override_train(train: TrainSpec, target: TargetSpec, place: str) -> TrainSpec:
    """`train` with the target's overrides; a FieldError below `place` if one is refused."""
    try:
        return TrainSpec.model_validate(train.model_dump() | target.train)
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join([f"{place}.train", *(str(part) for part in first["loc"])])
        raise FieldError(path, first["input"], reason(error)) from None


def check_trained_base(
    options: GrowthOptions, base: TrainSpec, target: TrainSpec, place: str
) -> None:
    """Raise a FieldError unless a target below `place` can use the base's optimizer and weights."""
    try:
        growth_rules.check_optimizers(options, base, target)
    except ValueError as error:
        path = f"{place}.train.optimizer"
        raise FieldError(path, target.optimizer, str(error)) from None
    try:
        growth_rules.check_base_weights(options, base)
    except ValueError as error:
        raise FieldError("warmstart.base_weights", options.base_weights, str(error)) from None


def check_size(run: RunSpec) -> None:
    """Raise ValueError when the sizes that follow from a run are beyond anything that can be."""
    tokens = run.train.num_tokens or run.train.tokens_per_param * count_params(run.model).total
    if tokens > MAX_TOKENS or run.tokens_per_step > MAX_TOKENS:
        raise ValueError(f"the run would train on {tokens:.3g} tokens; {MAX_TOKENS:.0e} at most")
