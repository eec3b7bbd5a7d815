"""Results of a coordinate check: mean |x| by kind of layer, size and step, and slopes; no torch.

The slope of log mean |x| against log size is 0 where activations do not depend on size.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import linear_regression
from typing import Literal, Self

from pydantic import Field

from warmcore.specs.fields import Positive, PositiveInt, Spec
from warmcore.specs.model import ModelSpec
from warmcore.specs.train import TrainSpec

Axis = Literal["width", "depth"]
Kind = Literal["embedding", "attention", "ffn", "stream", "unembedding"]

# `stream` is the output of the last block. The output of the final norm would not do: it contains
# the logit multiplier.
KINDS: tuple[Kind, ...] = ("embedding", "attention", "ffn", "stream", "unembedding")
# At a slope of 0.05, activations grow by 3.5 % whenever the size doubles (2^0.05 = 1.035).
TOLERANCE = 0.05


class AxisCheck(Spec):
    """Mean |x| and slopes along an axis. Step 0 is before the first update."""

    axis: Axis
    sizes: tuple[PositiveInt, ...] = Field(min_length=2)
    means: dict[Kind, tuple[tuple[float, ...], ...]] = Field(description="by kind, step and size")
    slopes: dict[Kind, tuple[float | None, ...]] = Field(
        description="by kind and step; None if a mean is 0, for example of logits at step 0"
    )

    @classmethod
    def from_means(
        cls, axis: Axis, sizes: Sequence[int], means: Mapping[Kind, Sequence[Sequence[float]]]
    ) -> Self:
        """Return the check with the slopes of `means`, given by kind, step and size."""
        fixed: dict[Kind, tuple[tuple[float, ...], ...]] = {}
        slopes: dict[Kind, tuple[float | None, ...]] = {}
        for kind, steps in means.items():
            fixed[kind] = tuple(map(tuple, steps))
            slopes[kind] = tuple(fit_slope(sizes, sized) for sized in steps)
        return cls(axis=axis, sizes=tuple(sizes), means=fixed, slopes=slopes)

    @property
    def last_slopes(self) -> dict[Kind, float]:
        """Slope of each kind after the last step."""
        last: dict[Kind, float] = {}
        for kind, by_step in self.slopes.items():
            if (found := by_step[-1]) is not None:
                last[kind] = found
        return last

    def find_steep_kinds(self, tolerance: float) -> dict[Kind, float]:
        """Return the last slope of each kind where it exceeds the tolerance."""
        return {k: found for k, found in self.last_slopes.items() if abs(found) > tolerance}


def fit_slope(sizes: Sequence[int], means: Sequence[float]) -> float | None:
    """Return the least-squares slope of log mean |x| against log size; None if a mean is 0."""
    if not all(means):
        return None
    return linear_regression([math.log(n) for n in sizes], [math.log(x) for x in means]).slope


class CoordCheck(Spec):
    """A coordinate check along width, depth or both, with the settings that produced it."""

    model: ModelSpec
    train: TrainSpec
    context: PositiveInt
    num_steps: PositiveInt
    num_seeds: PositiveInt
    tolerance: Positive = TOLERANCE
    axes: tuple[AxisCheck, ...]

    @property
    def is_flat(self) -> bool:
        """True if no activation depends on the size."""
        return not any(axis.find_steep_kinds(self.tolerance) for axis in self.axes)
