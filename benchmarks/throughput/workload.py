"""The search that both sides serve, its finished trials, and how one scenario is measured."""

import itertools
import math
import statistics
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from throughput import machine

if TYPE_CHECKING:
    from throughput.sides import Side
    from throughput.stack import Stack

REPORTS = 3
SPACE: dict[str, dict[str, Any]] = {
    "lr": {"type": "float", "low": 5e-4, "high": 3e-2, "log": True},
    "weight_decay": {"type": "float", "low": 0.0, "high": 0.3},
    "warmup_fraction": {"type": "float", "low": 0.0, "high": 0.3},
    "beta1": {"type": "float", "low": 0.8, "high": 0.99},
    "grad_clip": {"type": "float", "low": 0.1, "high": 10.0, "log": True},
}
_FRESH_BELOW = 1000  # a round of a larger study does not change its size
_names = itertools.count()


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


@dataclass
class Measured:
    """One row: both sides, round by round."""

    scenario: Scenario
    ours: Spent
    theirs: Spent
    api_rss_mb: tuple[float, float]

    @property
    def ratios(self) -> list[float]:
        """Ours over theirs, by pairs of rounds."""
        return [o / t for o, t in zip(self.ours.per_second, self.theirs.per_second, strict=True)]

    @property
    def ratio(self) -> float:
        """The median of the paired ratios."""
        return statistics.median(self.ratios)


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


def measure(scenario: Scenario, ours: "Side", theirs: "Side", running: "Stack") -> Measured:
    """Let the sides take turns."""
    before = machine.rss_mb(running.api_pids)
    spent: dict[str, Spent] = {"service": Spent(), "optuna": Spent()}
    study = ""
    for number in range(scenario.rounds):
        if not study or scenario.finished < _FRESH_BELOW:
            study = f"study-{next(_names)}"
            for side in (ours, theirs):
                side.create(study, scenario)
        for side in (ours, theirs) if number % 2 == 0 else (theirs, ours):
            side.round(scenario, spent[side.name])
    after = machine.rss_mb(running.api_pids)
    return Measured(scenario, spent["service"], spent["optuna"], (before, after))
