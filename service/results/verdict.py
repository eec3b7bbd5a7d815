"""Whether growing paid (METHOD §6): pure arithmetic on finished runs.

Per seed `s` the difference of final validation losses is `d_s = warm_s - cold_s`, nats per token.
Its mean over `n` seeds has Student's interval `mean(d) ± t(0.975, n-1) · stdev(d) / sqrt(n)`, and
growing is said to pay only when all of that lies below 0. Runs are compared cooled down, never
mid-curve.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import fsum

from scipy.special import stdtrit

from service.lifecycle import LIVE_RUN_STATES
from service.results.numbers import clamp_to_finite, fraction_between, mean, standard_error
from service.results.schemas import (
    Costs,
    Evaluation,
    Growth,
    Interval,
    SeedPair,
    TargetRun,
    Verdict,
)
from service.results.wording import write_sentence

CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Pending:
    """There is no verdict; `why` says what is missing."""

    why: str


def judge_runs(runs: Sequence[TargetRun], *, growth: Growth, costs: Costs) -> Verdict | Pending:
    """Compare the warm and the cold runs of a study's own targets on the last rung."""
    if waiting := _waiting(runs):
        return Pending(why=waiting)
    last = select_last_rung(runs)
    pairs = pair_runs(last)
    left_out = (*_fallen(runs), *_unmatched(last, {p.seed for p in pairs}))
    if not pairs:
        reasons = "; ".join(left_out)
        return Pending(why=f"no seed has both a warm and a cold run that succeeded: {reasons}")
    diverged = tuple(sorted(r.seed_number for r in runs if r.arm == "warm" and r.diverged))
    return _verdict(pairs, left_out, growth, costs, warm_diverged=diverged)


def select_last_rung(runs: Sequence[TargetRun]) -> tuple[TargetRun, ...]:
    """The runs of the largest model: what the study is for."""
    last = max((r.rung for r in runs), default=0)
    return tuple(r for r in runs if r.rung == last)


def _waiting(runs: Sequence[TargetRun]) -> str | None:
    if not runs:
        return "the target's runs have not started"
    live = [f"{_name(r)} is {r.state}" for r in runs if r.state in LIVE_RUN_STATES]
    if live:
        return f"{len(live)} of {len(runs)} target runs are unfinished: {', '.join(live)}"
    if all(r.arm == "warm" for r in runs):
        return "no cold run to compare with: set warmstart.control to true"
    return None


def _name(run: TargetRun) -> str:
    trunk = "'s trunk" if run.is_trunk else ""
    rung = f" at rung {run.rung}" if run.rung else ""
    return f"{run.arm} seed {run.seed_number}{trunk}{rung}"


def _verdict(
    pairs: tuple[SeedPair, ...],
    left_out: tuple[str, ...],
    growth: Growth,
    costs: Costs,
    *,
    warm_diverged: tuple[int, ...],
) -> Verdict:
    differences = [p.difference_nats for p in pairs]
    interval = student_interval(differences)
    verdict = Verdict(
        grow=interval is not None and interval.high < 0 and not warm_diverged,
        sentence="",
        seeds=len(pairs),
        difference_nats=mean(differences),
        interval_nats=interval,
        speedup=token_speedup(pairs),
        speedup_base_counted=base_counted_speedup(pairs, costs),
        growth=growth,
        pairs=pairs,
        left_out=left_out,
    )
    return verdict.model_copy(update={"sentence": write_sentence(verdict, costs, warm_diverged)})


def pair_runs(runs: Iterable[TargetRun]) -> tuple[SeedPair, ...]:
    """The seeds whose warm and cold runs both succeeded on equal terms, in their order."""
    done = [r for r in runs if r.state == "succeeded" and r.val_loss_nats is not None]
    cold = {r.seed: r for r in done if r.arm == "cold"}
    warm = sorted((r for r in done if r.arm == "warm"), key=lambda r: r.seed_number)
    return tuple(
        _pair(run, cold[run.seed])
        for run in warm
        if run.seed in cold and _equal(run, cold[run.seed])
    )


def _equal(warm: TargetRun, cold: TargetRun) -> bool:
    """Whether two runs differ in their start alone: the same budget, the same text."""
    return (warm.tokens, warm.data_hash) == (cold.tokens, cold.data_hash)


def _pair(warm: TargetRun, cold: TargetRun) -> SeedPair:
    assert warm.val_loss_nats is not None
    assert cold.val_loss_nats is not None
    reached = tokens_to_reach(warm.curve, cold.val_loss_nats)
    return SeedPair(
        seed=warm.seed,
        seed_number=warm.seed_number,
        tokens=cold.tokens,
        warm_run_id=warm.run_id,
        cold_run_id=cold.run_id,
        warm_loss_nats=warm.val_loss_nats,
        cold_loss_nats=cold.val_loss_nats,
        difference_nats=clamp_to_finite(warm.val_loss_nats - cold.val_loss_nats),
        tokens_to_cold_loss=reached,
        speedup=None if reached is None else cold.tokens / reached,
    )


def _fallen(runs: Iterable[TargetRun]) -> list[str]:
    """The runs that ended without a result, and how."""
    fallen = sorted((r for r in runs if r.state != "succeeded"), key=_order)
    return [f"{_name(r)} {'diverged' if r.diverged else r.state}" for r in fallen]


def _unmatched(runs: Iterable[TargetRun], judged: set[int]) -> list[str]:
    """The results that have nothing equal to be compared with."""
    alone = sorted((r for r in runs if r.state == "succeeded" and r.seed not in judged), key=_order)
    return [
        f"{_name(r)} ({r.tokens} tokens of corpus {(r.data_hash or 'unknown')[:8]}) "
        "has no equal partner"
        for r in alone
    ]


def _order(run: TargetRun) -> tuple[int, int, str]:
    return run.rung, run.seed_number, run.arm


def tokens_to_reach(curve: Sequence[Evaluation], goal_nats: float) -> float | None:
    """Where the curve first meets the goal, linear between evaluations; None when it never does.

    Nothing is known before the first evaluation, so a goal met there counts from there. The
    evaluation of untrained weights (0 tokens) is no training and is skipped.
    """
    before: Evaluation | None = None
    for here in curve:
        if here.tokens == 0:
            continue
        if here.val_loss_nats <= goal_nats:
            return float(here.tokens) if before is None else _crossing(before, here, goal_nats)
        before = here
    return None


def _crossing(before: Evaluation, here: Evaluation, goal_nats: float) -> float:
    fraction = fraction_between(before.val_loss_nats, goal_nats, here.val_loss_nats)
    return before.tokens + fraction * (here.tokens - before.tokens)


def student_interval(differences: Sequence[float]) -> Interval | None:
    """The mean's Student-t interval; None from a single difference, which has no spread."""
    n = len(differences)
    if n < 2:  # noqa: PLR2004 - one seed has no degree of freedom
        return None
    middle = mean(differences)
    half = clamp_to_finite(
        float(stdtrit(n - 1, (1 + CONFIDENCE) / 2)) * standard_error(differences)
    )
    low, high = clamp_to_finite(middle - half), clamp_to_finite(middle + half)
    return Interval(low=low, high=high, confidence=CONFIDENCE)


def token_speedup(pairs: Sequence[SeedPair]) -> float | None:
    """Cold's tokens over warm's to the same loss, over all seeds; None unless each got there."""
    reached = [p.tokens_to_cold_loss for p in pairs if p.tokens_to_cold_loss is not None]
    if len(reached) < len(pairs):
        return None
    return sum(p.tokens for p in pairs) / fsum(reached)


def base_counted_speedup(pairs: Sequence[SeedPair], costs: Costs) -> float | None:
    """Cold's FLOPs over warm's to the same loss with the base's own added.

    A model's FLOPs are proportional to its tokens, so warm gets there at `cold_flops / speedup`.
    """
    speedup = token_speedup(pairs)
    if speedup is None or costs.cold_flops is None or costs.base_flops is None:
        return None
    return costs.cold_flops / (costs.cold_flops / speedup + costs.base_flops)
