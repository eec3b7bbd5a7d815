"""A verdict for each of a target's token budgets: pure arithmetic on finished runs."""

from collections.abc import Callable, Sequence

from service.results.schemas import BudgetResult, Costs, Growth, TargetRun, Verdict
from service.results.verdict import judge_runs

ComputeCosts = Callable[[int], Costs]
"""Costs by branch number."""


def judge_budgets(
    runs: Sequence[TargetRun], budgets: Sequence[float], growth: Growth, costs_of: ComputeCosts
) -> tuple[BudgetResult, ...]:
    """Judge each budget by the runs that were cooled down at it, as if there were no others."""
    found: list[BudgetResult] = []
    for branch, budget in enumerate(budgets, start=1):
        here = select_branch_runs(runs, branch)
        costs = costs_of(branch)
        judged = judge_runs(here, growth=growth, costs=costs)
        verdict = judged if isinstance(judged, Verdict) else None
        found.append(
            BudgetResult(
                tokens_per_param=budget,
                num_tokens=max((r.num_tokens for r in here if r.branch), default=None),
                costs=costs,
                verdict=verdict,
                pending=None if isinstance(judged, Verdict) else judged.why,
            )
        )
    return tuple(found)


def select_branch_runs(runs: Sequence[TargetRun], branch: int) -> tuple[TargetRun, ...]:
    """The runs of one budget; a trunk stands for the run that has not left it yet."""
    here = [r for r in runs if r.branch == branch]
    left = {r.trunk_id for r in here}
    return (*here, *(r for r in runs if r.is_trunk and r.run_id not in left))
