"""The search space: dimensions, what they hold, and how many points a grid over them has."""

import math
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from warmcore.specs import TUNABLE_PARAMS, WHOLE_PARAMS, PositiveInt, Spec, TrainSpec
from warmcore.specs.fields import FieldError

Finite = Annotated[float, Field(allow_inf_nan=False)]
Whole = Annotated[int, Field(ge=-(2**53), le=2**53)]
MAX_GRID_POINTS = 100_000


class FloatDimension(Spec):
    """A range of real numbers; `log` searches its logarithm, `step` a grid."""

    type: Literal["float"]
    low: Finite
    high: Finite
    log: bool = False
    step: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None

    @model_validator(mode="after")
    def _is_a_range(self) -> Self:
        _check_range(self.low, self.high, log=self.log, step=self.step)
        return self

    @property
    def bounds(self) -> tuple[Any, ...]:
        """The values at which a field's own limits are checked."""
        return (self.low, self.high)


class IntDimension(Spec):
    """A range of whole numbers, both ends included."""

    type: Literal["int"]
    low: Whole
    high: Whole
    log: bool = False
    step: PositiveInt | None = None

    @model_validator(mode="after")
    def _is_a_range(self) -> Self:
        _check_range(self.low, self.high, log=self.log, step=self.step)
        return self

    @property
    def bounds(self) -> tuple[Any, ...]:
        """The values at which a field's own limits are checked."""
        return (self.low, self.high)


class CategoricalDimension(Spec):
    """A choice among given numbers."""

    type: Literal["categorical"]
    choices: Annotated[tuple[Whole | Finite, ...], Field(min_length=1, max_length=10_000)]

    @property
    def bounds(self) -> tuple[Any, ...]:
        """Every choice: there is no order to check only the ends of."""
        return self.choices


Dimension = Annotated[
    FloatDimension | IntDimension | CategoricalDimension, Field(discriminator="type")
]


def _check_range(low: float, high: float, *, log: bool, step: float | None) -> None:
    if low >= high:
        raise FieldError("low", low, f"low {low:g} must be below high {high:g}")
    if log and low <= 0:
        raise FieldError("low", low, f"log needs low above 0, not {low:g}; try 1e-4 or log: false")
    if log and step is not None:
        raise FieldError("step", step, f"log and step {step:g} exclude each other; drop one")


def check_dimension(name: str, dimension: Dimension) -> None:
    """Raise a FieldError unless `name` can be tuned along `dimension`."""
    path = f"search_space.{name}"
    if name not in TUNABLE_PARAMS:
        works = ", ".join(sorted(TUNABLE_PARAMS))
        raise FieldError(path, name, f"not tunable; these are: {works}")
    if name not in WHOLE_PARAMS:
        return
    if isinstance(dimension, FloatDimension):
        raise FieldError(f"{path}.type", "float", f"{name} is a whole number; use type int")
    for value in dimension.bounds:
        if not isinstance(value, int):
            raise FieldError(path, value, f"{name} is a whole number; {round(value)} would work")


def check_batch_parts(space: dict[str, Dimension], train: TrainSpec, place: str) -> None:
    """Raise a FieldError unless every batch size that may be tried has `accumulate` equal parts."""
    sizes, parts = space.get("batch_size"), train.accumulate
    if not isinstance(sizes, IntDimension) or parts == 1:
        return
    if sizes.log or sizes.low % parts or (sizes.step or 1) % parts:
        message = (
            f"not every batch size of the search space is a multiple of accumulate {parts}; "
            f"give low and step as multiples of {parts} and no log, or type categorical"
        )
        raise FieldError(place, parts, message)


def check_grid(space: dict[str, Dimension], trials: int) -> None:
    """Raise a FieldError unless a grid over `space` exists, is of sane size and has `trials`."""
    for name, dimension in space.items():
        if isinstance(dimension, FloatDimension) and dimension.step is None:
            message = "sampler grid needs a step here, or type categorical with choices"
            raise FieldError(f"search_space.{name}.step", None, message)
    size = math.prod(count_grid_points(dimension) for dimension in space.values())
    if size > MAX_GRID_POINTS:
        message = f"the grid has {size:.3g} points; {MAX_GRID_POINTS} at most, so use larger steps"
        raise FieldError("search_space", None, message)
    if trials > size:
        message = f"{trials} trials exceed the grid's {size} points; {size} would work"
        raise FieldError("hpo.trials", trials, message)


def count_grid_points(dimension: Dimension) -> int:
    """How many values a grid visits along one dimension."""
    if isinstance(dimension, CategoricalDimension):
        return len(dimension.choices)
    return int((dimension.high - dimension.low) / (dimension.step or 1) + 1e-9) + 1


def list_grid_points(dimension: Dimension) -> tuple[Any, ...]:
    """The values that a grid visits along one dimension."""
    if isinstance(dimension, CategoricalDimension):
        return dimension.choices
    step = dimension.step or 1
    return tuple(dimension.low + i * step for i in range(count_grid_points(dimension)))


def contains_value(dimension: Dimension, value: object) -> bool:
    """Whether a value that a user enqueues lies in the dimension."""
    if isinstance(dimension, CategoricalDimension):
        return any(type(value) is type(choice) and value == choice for choice in dimension.choices)
    numbers = int if isinstance(dimension, IntDimension) else (int, float)
    if isinstance(value, bool) or not isinstance(value, numbers):
        return False
    return dimension.low <= value <= dimension.high
