"""The measurement of both sides in turns."""

import itertools
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

from throughput import machine
from throughput.workload import Scenario, Spent

if TYPE_CHECKING:
    from throughput.sides import Side
    from throughput.stack import Stack

_FRESH_BELOW = 1000  # a round adds too few trials to change a larger study
_names = itertools.count()


@dataclass
class Measured:
    """A row of the table: both sides, round by round."""

    scenario: Scenario
    ours: Spent
    theirs: Spent
    api_rss_mb: tuple[float, float]

    @property
    def ratios(self) -> list[float]:
        """Our trials per second over Optuna's, for each pair of rounds."""
        return [o / t for o, t in zip(self.ours.per_second, self.theirs.per_second, strict=True)]

    @property
    def ratio(self) -> float:
        """The median of the paired ratios."""
        return statistics.median(self.ratios)


def measure_scenario(
    scenario: Scenario, ours: "Side", theirs: "Side", running: "Stack"
) -> Measured:
    """Measure a scenario with both sides in turns."""
    before = machine.rss_mb(running.api_pids)
    spent: dict[str, Spent] = {"service": Spent(), "optuna": Spent()}
    study = ""
    for number in range(scenario.rounds):
        if not study or scenario.finished < _FRESH_BELOW:
            study = f"study-{next(_names)}"
            for side in (ours, theirs):
                side.prepare_study(study, scenario)
        # Ours first in even rounds, Optuna first in odd rounds: a trend of the load cancels out.
        for side in (ours, theirs) if number % 2 == 0 else (theirs, ours):
            side.run_round(scenario, spent[side.name])
    after = machine.rss_mb(running.api_pids)
    return Measured(scenario, spent["service"], spent["optuna"], (before, after))
