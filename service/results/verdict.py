"""The verdict on growing (docs/method.md): pure arithmetic on finished runs.

For each seed `s` the difference of final validation losses is `d_s = warm_s - cold_s`, in nats per
token. The mean over `n` seeds has Student's interval
`mean(d) ± t(0.975, n-1) · stdev(d) / sqrt(n)`. Growing paid only if the whole interval is below 0.
Only runs that have cooled down are compared, never points in the middle of a curve.
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
    """A verdict that is not possible yet; `why` names the missing runs."""

    why: str


def judge_runs(runs: Sequence[TargetRun], *, growth: Growth, costs: Costs) -> Verdict | Pending:
    """Compare the warm and the cold runs of a study's own targets on the last rung."""
    if reason := _explain_waiting(runs):
        return Pending(why=reason)
    last = select_last_rung(runs)
    pairs = pair_runs(last)
    left_out = (*_list_failures(runs), *_list_unpaired(last, {p.seed for p in pairs}))
    if not pairs:
        reasons = "; ".join(left_out)
        return Pending(why=f"no seed has a warm and a cold run to compare: {reasons}")
    diverged = tuple(sorted(r.seed_number for r in runs if r.arm == "warm" and r.diverged))
    return _make_verdict(pairs, left_out, growth, costs, warm_diverged=diverged)


def select_last_rung(runs: Sequence[TargetRun]) -> tuple[TargetRun, ...]:
    """Return the runs of the largest model, the purpose of the study."""
    last = max((r.rung for r in runs), default=0)
    return tuple(r for r in runs if r.rung == last)


def _explain_waiting(runs: Sequence[TargetRun]) -> str | None:
    if not runs:
        return "the target's runs have not started"
    live = [f"{_name_run(r)} is {r.state}" for r in runs if r.state in LIVE_RUN_STATES]
    if live:
        return f"{len(live)} of {len(runs)} target runs are unfinished: {', '.join(live)}"
    if all(r.arm == "warm" for r in runs):
        return "there is no cold run to compare with; set warmstart.control to true"
    return None


def _name_run(run: TargetRun) -> str:
    trunk = "'s trunk" if run.is_trunk else ""
    rung = f" at rung {run.rung}" if run.rung else ""
    return f"{run.arm} seed {run.seed_number}{trunk}{rung}"


def _make_verdict(
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
        # A warm run that diverged has no loss and no pair, so the interval cannot contain it.
        # Without the last condition, the remaining seeds would make growing look safe.
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
    """Pair the warm and the cold run of each seed where both succeeded on equal terms, by seed."""
    done = [r for r in runs if r.state == "succeeded" and r.val_loss_nats is not None]
    cold = {r.seed: r for r in done if r.arm == "cold"}
    warm = sorted((r for r in done if r.arm == "warm"), key=lambda r: r.seed_number)
    return tuple(
        _make_pair(run, cold[run.seed])
        for run in warm
        if run.seed in cold and _have_equal_terms(run, cold[run.seed])
    )


def _have_equal_terms(warm: TargetRun, cold: TargetRun) -> bool:
    """Return whether two runs differ only in their start: same budget, same text."""
    return (warm.tokens, warm.data_hash) == (cold.tokens, cold.data_hash)


def _make_pair(warm: TargetRun, cold: TargetRun) -> SeedPair:
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


def _list_failures(runs: Iterable[TargetRun]) -> list[str]:
    """Name the runs that ended without a result, and their ends."""
    failures = sorted((r for r in runs if r.state != "succeeded"), key=_sort_key)
    return [f"{_name_run(r)} {'diverged' if r.diverged else r.state}" for r in failures]


def _list_unpaired(runs: Iterable[TargetRun], judged: set[int]) -> list[str]:
    """Name the runs that succeeded, but have no run with equal terms to compare with."""
    unpaired = [r for r in runs if r.state == "succeeded" and r.seed not in judged]
    return [
        f"{_name_run(r)} ({r.tokens} tokens of corpus {(r.data_hash or 'unknown')[:8]}) "
        f"has no {'cold' if r.arm == 'warm' else 'warm'} run with equal tokens and corpus"
        for r in sorted(unpaired, key=_sort_key)
    ]


def _sort_key(run: TargetRun) -> tuple[int, int, str]:
    return run.rung, run.seed_number, run.arm


def tokens_to_reach(curve: Sequence[Evaluation], goal_nats: float) -> float | None:
    """Return the tokens at which the curve first reaches the goal; None if it never does.

    The curve is linear between evaluations. A goal that the first evaluation already meets counts
    from that evaluation: nothing is measured before it.
    """
    before: Evaluation | None = None
    for here in curve:
        # The evaluation at 0 tokens is of untrained weights. A warm start may meet the goal there:
        # it would make the speedup infinite.
        if here.tokens == 0:
            continue
        if here.val_loss_nats <= goal_nats:
            return float(here.tokens) if before is None else _find_crossing(before, here, goal_nats)
        before = here
    return None


def _find_crossing(before: Evaluation, here: Evaluation, goal_nats: float) -> float:
    # For example 4.0 nats at 500 tokens and 2.0 nats at 1000: the curve is at 3.0 at 750 tokens.
    fraction = fraction_between(before.val_loss_nats, goal_nats, here.val_loss_nats)
    return before.tokens + fraction * (here.tokens - before.tokens)


# The interval is of the differences within pairs, not of the two arms' losses. A pair shares seed
# and data order, so most of the noise cancels. For example warm ends at 1.00 and 1.01, cold at 2.00
# twice. The differences are -1.00 and -0.99: mean -0.995, stdev 0.00707. t(0.975, 1) is 12.71,
# hence the half width 12.71 · 0.00707 / sqrt(2) = 0.0635: from -1.0585 to -0.9315, wholly below 0.
def student_interval(differences: Sequence[float]) -> Interval | None:
    """Return the mean's Student-t interval; None for a single difference, which has no spread."""
    n = len(differences)
    if n < 2:  # noqa: PLR2004 - one seed has no degree of freedom
        return None
    middle = mean(differences)
    t = float(stdtrit(n - 1, (1 + CONFIDENCE) / 2))
    half = clamp_to_finite(t * standard_error(differences))
    low, high = clamp_to_finite(middle - half), clamp_to_finite(middle + half)
    return Interval(low=low, high=high, confidence=CONFIDENCE)


def token_speedup(pairs: Sequence[SeedPair]) -> float | None:
    """Return cold's tokens over warm's tokens to the same loss, summed over all seeds.

    None if the warm run of any seed never reached cold's final loss.
    """
    reached = [p.tokens_to_cold_loss for p in pairs if p.tokens_to_cold_loss is not None]
    # A mean over the seeds that reached the loss would leave out exactly the slowest seeds.
    if len(reached) < len(pairs):
        return None
    return sum(p.tokens for p in pairs) / fsum(reached)


def base_counted_speedup(pairs: Sequence[SeedPair], costs: Costs) -> float | None:
    """Return cold's FLOPs over warm's FLOPs to the same loss with the base's own FLOPs added.

    FLOPs are proportional to tokens, so warm reaches the loss after `cold_flops / speedup`.
    """
    speedup = token_speedup(pairs)
    if speedup is None or costs.cold_flops is None or costs.base_flops is None:
        return None
    # For example cold 4e9, speedup 1.2, base 1e9: 4e9 / (3.33e9 + 1e9) = 0.92, slower than cold.
    return costs.cold_flops / (costs.cold_flops / speedup + costs.base_flops)
