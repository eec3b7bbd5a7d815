"""An estimate of a study's remaining time: its remaining FLOPs over its recent FLOPs per second."""

from collections import deque
from collections.abc import Iterable

from service.lifecycle import FINAL_RUN_STATES
from service.runs.schemas import RunView
from service.specs.budgets import count_flops_with_branches
from service.specs.study import StudySpec
from service.studies.schemas import RunCounts, StudyView

# A minute smooths the pauses between trials, and follows a fleet that grows or shrinks.
_WINDOW_SECONDS = 60.0
# Two points close together give a speed that is mostly noise.
_ENOUGH_SECONDS = 5.0


class Pace:
    """The FLOPs per second of a study over the last minute."""

    def __init__(self) -> None:
        self._costs: deque[tuple[float, float]] = deque()

    def note_cost(self, at_seconds: float, cost_flops: float) -> None:
        """Record the study's cost at a time; times must rise."""
        self._costs.append((at_seconds, cost_flops))
        while at_seconds - self._costs[0][0] > _WINDOW_SECONDS:
            self._costs.popleft()

    @property
    def flops_per_second(self) -> float | None:
        """The recent speed; None in the first 5 s, and while the cost does not rise."""
        if not self._costs:
            return None
        (first_at, first), (last_at, last) = self._costs[0], self._costs[-1]
        if last_at - first_at < _ENOUGH_SECONDS or last <= first:
            return None
        return (last - first) / (last_at - first_at)

    def estimate_seconds_left(self, study: StudyView, running: Iterable[RunView]) -> float | None:
        """Return the seconds to the end if no further trial is pruned; None without a speed."""
        speed = self.flops_per_second
        return None if speed is None else count_remaining_flops(study, running) / speed


def count_remaining_flops(study: StudyView, running: Iterable[RunView]) -> float:
    """Return the FLOPs of the trials and targets that have not ended, if none is pruned."""
    # Example: 4 trials of 1e12 FLOPs, a finished trial and a half-done trial. 3 trials have not
    # ended: 3e12, less the 0.5e12 of the running trial, leaves 2.5e12 FLOPs.
    spec, runs = study.spec, list(running)
    trials = spec.hpo.trials - _count_ended_runs(study.trials)
    flops = max(0, trials) * spec.trial_run(0).train_flops
    # Targets differ in size: take the finished share of the runs as the share of the FLOPs.
    if spec.rungs:
        share_left = max(0.0, 1 - _count_ended_runs(study.targets) / spec.num_target_runs)
        flops += share_left * _count_target_flops(spec)
    return max(0.0, flops - sum(run.cost_flops for run in runs))


def _count_ended_runs(counts: RunCounts) -> int:
    return sum(getattr(counts, state) for state in FINAL_RUN_STATES)


def _count_target_flops(spec: StudySpec) -> float:
    rungs = [count_flops_with_branches(spec.rung_run(rung, 0)) for rung in range(len(spec.rungs))]
    # Each seed trains every rung of the ladder warm, and the last rung also cold.
    cold = rungs[-1] if spec.warmstart.control else 0.0
    return (sum(rungs) + cold) * spec.warmstart.seeds
