"""What a study's runs cost, with the base sunk and with it counted. Pure."""

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
    """Both accountings; a ladder's lower warm runs belong to the base of its last rung.

    Of several budgets, those of the runs at `branch`.
    """
    here = [r for r in targets if r.branch == branch and not r.is_trunk]
    last = select_last_rung(here)
    warm = _mean_flops(last, "warm")
    lower = [r for r in here if r.arm == "warm" and r not in last]
    seeds = len({r.seed for r in lower}) or 1
    base = None if best_flops is None else best_flops + sum(r.cost_flops for r in lower) / seeds
    return Costs(
        search_flops=search_flops,
        base_flops=base,
        warm_flops=warm,
        warm_base_counted_flops=None if warm is None or base is None else warm + base,
        cold_flops=_mean_flops(last, "cold"),
        targets_flops=sum(r.cost_flops for r in targets),
        targets_alone_flops=sum(r.alone_flops for r in targets if not r.is_trunk),
        total_flops=total_flops,
    )


def _mean_flops(runs: Iterable[TargetRun], arm: str) -> float | None:
    flops = [r.alone_flops for r in runs if r.arm == arm and r.state == "succeeded"]
    return fmean(flops) if flops else None
