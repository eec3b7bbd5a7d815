"""The search that both sides serve, and its finished trials."""

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
    """What one row of the table is about."""

    finished: int
    clients: int
    pruner: str
    rounds: int
    cycles: int


@dataclass
class Spent:
    """What the rounds of one side took."""

    per_second: list[float] = field(default_factory=list)
    calls: dict[str, list[float]] = field(default_factory=dict)
    cpu_ms: dict[str, list[float]] = field(default_factory=dict)
    commits: list[float] = field(default_factory=list)
    wal_kb: list[float] = field(default_factory=list)


def loss(params: dict[str, float]) -> float:
    """A bowl: 2 at 0.3 of the way along each dimension. `prefill` has the same."""
    return 2.0 + sum((_unit(SPACE[name], value) - 0.3) ** 2 for name, value in params.items())


def _unit(dimension: dict[str, Any], value: float) -> float:
    low, high = dimension["low"], dimension["high"]
    if dimension.get("log"):
        return math.log(value / low) / math.log(high / low)
    return (value - low) / (high - low)


def curve(params: dict[str, float]) -> list[float]:
    """What a trial reports: its loss, from above."""
    return [loss(params) + 1.0 / step for step in range(1, REPORTS + 1)]
