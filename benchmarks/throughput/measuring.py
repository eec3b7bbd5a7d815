"""Both sides measured by turns."""

import itertools
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

from throughput import machine
from throughput.workload import Scenario, Spent

if TYPE_CHECKING:
    from throughput.sides import Side
    from throughput.stack import Stack

_FRESH_BELOW = 1000  # a round of a larger study does not change its size
_names = itertools.count()


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
