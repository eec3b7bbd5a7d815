"""How long a study will take yet: the FLOPs that it has still to spend over its recent speed."""

from collections import deque
from collections.abc import Iterable

from service.lifecycle import FINAL_RUN_STATES
from service.runs.schemas import RunView
from service.specs.budgets import count_flops_with_branches
from service.specs.study import StudySpec
from service.studies.schemas import RunCounts, StudyView

_WINDOW_SECONDS = 60.0
_ENOUGH_SECONDS = 5.0


class Pace:
    """FLOPs against time over the last minute."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, float]] = deque()

    def see(self, at_seconds: float, cost_flops: float) -> None:
        """Note what the study had cost at a moment."""
        self._seen.append((at_seconds, cost_flops))
        while at_seconds - self._seen[0][0] > _WINDOW_SECONDS:
            self._seen.popleft()

    @property
    def flops_per_second(self) -> float | None:
        """None before there is enough to tell."""
        if not self._seen:
            return None
        (first_at, first), (last_at, last) = self._seen[0], self._seen[-1]
        if last_at - first_at < _ENOUGH_SECONDS or last <= first:
            return None
        return (last - first) / (last_at - first_at)

    def eta_seconds(self, study: StudyView, running: Iterable[RunView]) -> float | None:
        """Seconds to the end if no further trial is pruned; None while nobody can tell."""
        speed = self.flops_per_second
        return None if speed is None else count_remaining_flops(study, running) / speed


def count_remaining_flops(study: StudyView, running: Iterable[RunView]) -> float:
    """What the trials and targets that have not ended are still to cost, were none pruned."""
    spec, runs = study.spec, list(running)
    trials = spec.hpo.trials - _count_ended_runs(study.trials)
    flops = max(0, trials) * spec.trial_run(0).train_flops
    if spec.rungs:
        flops += max(
            0.0, 1 - _count_ended_runs(study.targets) / spec.num_target_runs
        ) * _count_target_flops(spec)
    return max(0.0, flops - sum(run.cost_flops for run in runs))


def _count_ended_runs(counts: RunCounts) -> int:
    return sum(getattr(counts, state) for state in FINAL_RUN_STATES)


def _count_target_flops(spec: StudySpec) -> float:
    rungs = [count_flops_with_branches(spec.rung_run(rung, 0)) for rung in range(len(spec.rungs))]
    cold = rungs[-1] if spec.warmstart.control else 0.0
    return (sum(rungs) + cold) * spec.warmstart.seeds
