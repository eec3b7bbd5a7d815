"""The cost of a study's runs in FLOPs, with the base sunk and with the base counted. Pure."""

from collections.abc import Iterable, Sequence
from statistics import fmean

from service.results.schemas import Costs, TargetRun
from service.results.verdict import select_last_rung


def compute_costs(
    *,
    search_flops: float,
    best_flops: float | None,
    targets: Sequence[TargetRun],
    total_flops: float,
    branch: int = 0,
) -> Costs:
    """Return both accountings of the runs at `branch`; 0 where the target has a single budget."""
    here = [r for r in targets if r.branch == branch and not r.is_trunk]
    last = select_last_rung(here)
    warm = _mean_flops(last, "warm")
    # A ladder of widths 96 and 128 grows the model of 128 from the warm run at 96, so the run at 96
    # belongs to the base. Each seed climbs the ladder alone: one base is their sum divided
    # by the number of seeds.
    lower = [r for r in here if r.arm == "warm" and r not in last]
    seeds = len({r.seed for r in lower}) or 1
    base = None if best_flops is None else best_flops + sum(r.cost_flops for r in lower) / seeds
    return Costs(
        search_flops=search_flops,
        base_flops=base,
        warm_flops=warm,
        warm_base_counted_flops=None if warm is None or base is None else warm + base,
        cold_flops=_mean_flops(last, "cold"),
        # Two sums: a trunk that two branches share counts once in the first, twice in the second.
        targets_flops=sum(r.cost_flops for r in targets),
        targets_alone_flops=sum(r.alone_flops for r in targets if not r.is_trunk),
        total_flops=total_flops,
    )


def _mean_flops(runs: Iterable[TargetRun], arm: str) -> float | None:
    # A run that failed stopped early: its cost says nothing about the cost of a whole run.
    flops = [r.alone_flops for r in runs if r.arm == arm and r.state == "succeeded"]
    return fmean(flops) if flops else None
