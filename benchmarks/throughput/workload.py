"""The search space and the losses of the benchmark, equal on both sides."""

import math
from dataclasses import dataclass, field
from typing import Any

REPORTS = 3
SPACE: dict[str, dict[str, Any]] = {
    "lr": {"type": "float", "low": 5e-4, "high": 3e-2, "log": True},
    "weight_decay": {"type": "float", "low": 0.0, "high": 0.3},
    "warmup_fraction": {"type": "float", "low": 0.0, "high": 0.3},
    "beta1": {"type": "float", "low": 0.8, "high": 0.99},
    "grad_clip": {"type": "float", "low": 0.1, "high": 10.0, "log": True},
}


@dataclass(frozen=True)
class Scenario:
    """The settings of a row of the table."""

    finished: int
    clients: int
    pruner: str
    rounds: int
    cycles: int


@dataclass
class Spent:
    """Times and costs of the rounds of a side."""

    per_second: list[float] = field(default_factory=list)
    calls: dict[str, list[float]] = field(default_factory=dict)
    cpu_ms: dict[str, list[float]] = field(default_factory=dict)
    commits: list[float] = field(default_factory=list)
    wal_kb: list[float] = field(default_factory=list)


def compute_loss(params: dict[str, float]) -> float:
    """Return a bowl's value: 2 at 0.3 of each dimension. The SQL of `prefill` has the same bowl."""
    return 2.0 + sum(
        (_scale_to_unit(SPACE[name], value) - 0.3) ** 2 for name, value in params.items()
    )


def _scale_to_unit(dimension: dict[str, Any], value: float) -> float:
    # With low 1e-4, high 1e-2 and a log scale: 1e-3 is 0.5.
    low, high = dimension["low"], dimension["high"]
    if dimension.get("log"):
        return math.log(value / low) / math.log(high / low)
    return (value - low) / (high - low)


def make_curve(params: dict[str, float]) -> list[float]:
    """Return the losses that a trial reports: they fall to `compute_loss` plus 1/3."""
    return [compute_loss(params) + 1.0 / step for step in range(1, REPORTS + 1)]
