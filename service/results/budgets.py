"""A verdict for each token budget of a target: pure arithmetic on finished runs."""

from collections.abc import Callable, Sequence

from service.results.schemas import BudgetResult, Costs, Growth, TargetRun, Verdict
from service.results.verdict import judge_runs

ComputeCosts = Callable[[int], Costs]
"""Returns the costs at a branch number."""


def judge_budgets(
    runs: Sequence[TargetRun], budgets: Sequence[float], growth: Growth, compute_costs: ComputeCosts
) -> tuple[BudgetResult, ...]:
    """Judge each budget by the runs that cooled down at it; the other budgets do not matter."""
    results: list[BudgetResult] = []
    for branch, budget in enumerate(budgets, start=1):
        here = select_branch_runs(runs, branch)
        costs = compute_costs(branch)
        judged = judge_runs(here, growth=growth, costs=costs)
        verdict = judged if isinstance(judged, Verdict) else None
        results.append(
            BudgetResult(
                tokens_per_param=budget,
                num_tokens=max((r.num_tokens for r in here if r.branch), default=None),
                costs=costs,
                verdict=verdict,
                pending=None if isinstance(judged, Verdict) else judged.why,
            )
        )
    return tuple(results)


def select_branch_runs(runs: Sequence[TargetRun], branch: int) -> tuple[TargetRun, ...]:
    """Return the runs of one budget, and the trunks that have no run at this budget yet.

    A trunk takes the place of the branch that has not left it: the budget stays pending.
    """
    here = [r for r in runs if r.branch == branch]
    branched = {r.trunk_id for r in here}
    # For example warm seed 0 has left its trunk at budget 1 and cold seed 0 has not. The runs of
    # budget 1 are then the warm branch and cold's trunk, and the verdict says "cold seed 0's trunk
    # is leased".
    return (*here, *(r for r in runs if r.is_trunk and r.run_id not in branched))
