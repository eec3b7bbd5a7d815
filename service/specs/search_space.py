"""The search space: its dimensions, their checks, and the points of a grid over them."""

import math
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from warmcore.specs import TUNABLE_PARAMS, WHOLE_PARAMS, PositiveInt, Spec, TrainSpec
from warmcore.specs.fields import FieldError

Finite = Annotated[float, Field(allow_inf_nan=False)]
Whole = Annotated[int, Field(ge=-(2**53), le=2**53)]
MAX_GRID_POINTS = 100_000


class FloatDimension(Spec):
    """A range of real numbers; `log` searches its logarithm, `step` searches a grid."""

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
        """The ends of the range: a value that a field refuses is found there."""
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
        """The ends of the range: a value that a field refuses is found there."""
        return (self.low, self.high)


class CategoricalDimension(Spec):
    """A choice among given numbers."""

    type: Literal["categorical"]
    choices: Annotated[tuple[Whole | Finite, ...], Field(min_length=1, max_length=10_000)]

    @property
    def bounds(self) -> tuple[Any, ...]:
        """Every choice, since a field may refuse any of them."""
        return self.choices


Dimension = Annotated[
    FloatDimension | IntDimension | CategoricalDimension, Field(discriminator="type")
]


def _check_range(low: float, high: float, *, log: bool, step: float | None) -> None:
    if low >= high:
        raise FieldError("low", low, f"low {low:g} must be below high {high:g}")
    # Optuna requires both of the following rules too, but fails at the first trial.
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
    # A float dimension over 8 to 16 would propose batch size 11.37.
    if isinstance(dimension, FloatDimension):
        raise FieldError(f"{path}.type", "float", f"{name} is a whole number; use type int")
    for value in dimension.bounds:
        if not isinstance(value, int):
            raise FieldError(path, value, f"{name} is a whole number; {round(value)} would work")


def check_batch_parts(space: dict[str, Dimension], train: TrainSpec, prefix: str) -> None:
    """Raise a FieldError unless every batch size of the search has `accumulate` equal parts."""
    sizes, parts = space.get("batch_size"), train.accumulate
    if not isinstance(sizes, IntDimension) or parts == 1:
        return
    # Example: accumulate 4 allows low 8 and step 4 (8, 12, 16), not low 8 and step 2 (10).
    if sizes.log or sizes.low % parts or (sizes.step or 1) % parts:
        message = (
            f"not every batch size of the search space is a multiple of accumulate {parts}; "
            f"give low and step as multiples of {parts} and no log, or type categorical"
        )
        raise FieldError(prefix, parts, message)


def check_grid(space: dict[str, Dimension], trials: int) -> None:
    """Raise a FieldError unless `space` has a grid of at least `trials` and not too many points."""
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
    """Return the number of values that a grid visits along a dimension."""
    if isinstance(dimension, CategoricalDimension):
        return len(dimension.choices)
    # 0.3 / 0.1 is 2.9999999999999996 in floating point, and 3 steps are meant.
    return int((dimension.high - dimension.low) / (dimension.step or 1) + 1e-9) + 1


def list_grid_points(dimension: Dimension) -> tuple[Any, ...]:
    """Return the values that a grid visits along a dimension."""
    if isinstance(dimension, CategoricalDimension):
        return dimension.choices
    step = dimension.step or 1
    return tuple(dimension.low + i * step for i in range(count_grid_points(dimension)))


def contains_value(dimension: Dimension, value: object) -> bool:
    """Return whether an enqueued value lies in the dimension."""
    if isinstance(dimension, CategoricalDimension):
        # `True == 1` and `1 == 1.0` in Python: compare the types too.
        return any(type(value) is type(choice) and value == choice for choice in dimension.choices)
    numbers = int if isinstance(dimension, IntDimension) else (int, float)
    if isinstance(value, bool) or not isinstance(value, numbers):
        return False
    return dimension.low <= value <= dimension.high
