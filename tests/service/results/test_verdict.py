"""The verdict's arithmetic and sentences, as laws over any losses."""

import json
from math import sqrt
from statistics import fmean

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from service.results.schemas import Costs, Evaluation, Growth, TargetRun, Verdict
from service.results.verdict import (
    Pending,
    judge_runs,
    pair_runs,
    student_interval,
    tokens_to_reach,
)

GROWTH = Growth(g_width=2.0, g_nonembedding=3.9, g_total=2.2)
COSTS = Costs(
    search_flops=8e9,
    base_flops=1e9,
    warm_flops=4e9,
    warm_base_counted_flops=5e9,
    cold_flops=4e9,
    total_flops=24e9,
)
TOKENS = 1000

losses = st.floats(0.5, 8.0)
curves = st.lists(losses, min_size=1, max_size=8)
arms = st.lists(st.tuples(curves, curves), min_size=1, max_size=6)


def curve(values):
    """Return evenly spaced evaluations; the last evaluation is at TOKENS."""
    n = len(values)
    return tuple(
        Evaluation(step=i, tokens=TOKENS * i // n, val_loss_nats=v)
        for i, v in enumerate(values, start=1)
    )


def run(arm, seed, values, **changes):
    fields = {
        "run_id": f"run_{arm}_{seed}",
        "arm": arm,
        "seed": 10**17 + seed,
        "seed_number": seed,
        "state": "succeeded",
        "val_loss_nats": values[-1],
        "tokens": TOKENS,
        "num_tokens": TOKENS,
        "cost_flops": 4e9,
        "curve": curve(values),
    }
    return TargetRun.model_validate(fields | changes)


def target(pairs):
    """Return the runs of each seed, from its pair (warm curve, cold curve)."""
    return [
        run(arm, seed, values)
        for seed, both in enumerate(pairs)
        for arm, values in zip(("warm", "cold"), both, strict=True)
    ]


def verdict(runs) -> Verdict:
    judged = judge_runs(runs, growth=GROWTH, costs=COSTS)
    assert isinstance(judged, Verdict), judged
    return judged


def pending(runs) -> str:
    judged = judge_runs(runs, growth=GROWTH, costs=COSTS)
    assert isinstance(judged, Pending), judged
    return judged.why


@given(arms)
def test_swapping_the_arms_flips_the_sign(pairs):
    one, other = verdict(target(pairs)), verdict(target([(c, w) for w, c in pairs]))
    # Exactly: negating every difference changes only the sign bit of the mean.
    assert one.difference_nats == -other.difference_nats
    if one.interval_nats and other.interval_nats:
        assert one.interval_nats.low == -other.interval_nats.high
    assert not (one.grow and other.grow)


@given(arms)
def test_the_interval_contains_the_mean_and_exists_from_two_seeds(pairs):
    v = verdict(target(pairs))
    assert (v.interval_nats is not None) == (len(pairs) >= 2)
    if v.interval_nats:
        assert v.interval_nats.low <= v.difference_nats <= v.interval_nats.high


@given(st.lists(curves, min_size=1, max_size=6))
def test_identical_arms_never_grow(values):
    v = verdict(target([(c, c) for c in values]))
    assert v.difference_nats == 0
    assert not v.grow
    assert v.sentence.startswith("Not shown at")


@given(arms)
def test_it_grows_exactly_when_the_whole_interval_is_below_zero(pairs):
    v = verdict(target(pairs))
    assert v.grow == (v.interval_nats is not None and v.interval_nats.high < 0)
    assert v.grow == v.sentence.startswith("Growing paid")


@given(arms, st.randoms(use_true_random=False))
def test_the_order_of_runs_does_not_matter(pairs, random):
    runs = target(pairs)
    shuffled = random.sample(runs, len(runs))
    assert verdict(runs) == verdict(shuffled)


@given(st.lists(st.tuples(losses, losses), min_size=2, max_size=6), st.integers(-3, 3))
def test_scaling_the_losses_scales_the_difference_and_its_interval(finals, exponent):
    scale = 2.0**exponent  # a power of two changes no bit of the mantissa
    small = verdict(target([([w], [c]) for w, c in finals]))
    large = verdict(target([([scale * w], [scale * c]) for w, c in finals]))
    assert large.difference_nats == scale * small.difference_nats
    assert small.interval_nats
    assert large.interval_nats
    assert large.interval_nats.high == pytest.approx(scale * small.interval_nats.high, rel=1e-12)
    assert large.grow == small.grow


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=8), st.floats(-1, 1))
def test_shifting_every_difference_shifts_the_interval(differences, shift):
    here = student_interval(differences)
    there = student_interval([d + shift for d in differences])
    assert here
    assert there
    assert there.low == pytest.approx(here.low + shift, abs=1e-9)
    assert there.high == pytest.approx(here.high + shift, abs=1e-9)


def test_the_interval_agrees_with_student_s_table():
    # t(0.975, 2) = 4.302652730, for the sample 1, 2, 3 of standard deviation 1.
    interval = student_interval([1.0, 2.0, 3.0])
    assert interval
    assert interval.high - 2.0 == pytest.approx(4.302652730 / sqrt(3), rel=1e-9)


@given(curves, losses)
def test_the_goal_is_reached_exactly_when_an_evaluation_is_at_or_below_it(values, goal):
    reached = tokens_to_reach(curve(values), goal)
    assert (reached is not None) == (min(values) <= goal)
    if reached is not None:
        assert 0 < reached <= TOKENS


@given(curves, losses, losses)
def test_an_easier_goal_is_reached_no_later(values, one, other):
    # A higher loss is easier to reach.
    hard, easy = sorted((one, other))
    reached = tokens_to_reach(curve(values), hard)
    assume(reached is not None)
    assert (tokens_to_reach(curve(values), easy) or TOKENS + 1) <= reached


@given(arms)
def test_a_speedup_above_one_means_reached_before_the_end(pairs):
    for p in verdict(target(pairs)).pairs:
        before_the_end = p.tokens_to_cold_loss is not None and p.tokens_to_cold_loss < TOKENS
        assert before_the_end == (p.speedup is not None and p.speedup > 1)


@given(arms)
def test_counting_the_base_never_makes_growth_faster(pairs):
    v = verdict(target(pairs))
    assert (v.speedup is None) == any(p.speedup is None for p in v.pairs)
    if v.speedup is not None and v.speedup_base_counted is not None:
        assert v.speedup_base_counted < v.speedup


def test_reaching_is_linear_between_evaluations():
    # 4.0 nats at 500 tokens, 2.0 nats at 1000.
    assert tokens_to_reach(curve([4.0, 2.0]), 3.0) == 750.0
    assert tokens_to_reach(curve([4.0, 2.0]), 2.0) == 1000.0
    assert tokens_to_reach(curve([4.0, 2.0]), 4.0) == 500.0


def test_an_evaluation_of_untrained_weights_is_no_training():
    untrained = Evaluation(step=0, tokens=0, val_loss_nats=1.0)
    assert tokens_to_reach((untrained, *curve([4.0, 2.0])), 3.0) == 750.0


def test_one_seed_says_that_it_cannot_tell():
    v = verdict(target([([3.0, 1.0], [3.0, 2.0])]))
    assert v.interval_nats is None
    assert not v.grow
    assert "1 seed" in v.sentence
    assert "one seed has no interval and may be chance" in v.sentence


def test_the_sentence_carries_its_numbers():
    v = verdict(target([([4.0, 1.0], [4.0, 2.0]), ([4.0, 1.01], [4.0, 2.0])]))
    assert v.grow
    # -1.00 and -0.99: mean -0.995, half width 12.706 * 0.00707 / sqrt(2) = 0.0635.
    assert v.sentence == (
        "Growing paid: over 2 seeds warm ended 0.9950 nats lower than cold "
        "(95% interval -1.0585 to -0.9315 nats); "
        "warm reached cold's final loss with 83% of cold's tokens (1.20x); "
        "a warm run costs 4.00e+09 FLOPs (5.00e+09 with the base counted), a cold run 4.00e+09."
    )


def test_worse_warm_runs_are_said_to_be_worse():
    v = verdict(target([([4.0, 2.0], [4.0, 1.0]), ([4.0, 2.01], [4.0, 1.0])]))
    assert not v.grow
    # 1.00 and 1.01 nats apart: the whole interval is above 0.
    assert v.sentence.startswith("Growing did not pay: over 2 seeds warm ended 1.0050 nats higher")
    assert "never reached" in v.sentence
    assert v.speedup is None


@pytest.mark.parametrize("state", ["queued", "leased"])
def test_there_is_no_verdict_while_a_run_is_unfinished(state):
    runs = target([([2.0], [3.0]), ([2.0], [3.0])])
    runs[-1] = run("cold", 1, [3.0], state=state)
    assert pending(runs) == f"1 of 4 target runs are unfinished: cold seed 1 is {state}"


def test_there_is_no_verdict_without_runs():
    assert "not started" in pending([])


def test_there_is_no_verdict_without_a_cold_run():
    runs = [r for r in target([([2.0], [3.0])]) if r.arm == "warm"]
    assert "no cold run" in pending(runs)


def test_a_pair_needs_both_of_its_runs():
    runs = [run("warm", 0, [2.0]), run("cold", 0, [3.0], state="failed", val_loss_nats=None)]
    why = pending(runs)
    assert "cold seed 0 failed" in why
    assert "warm seed 0 (1000 tokens of corpus unknown) has no cold run with equal tokens" in why


def test_unequal_budgets_are_never_compared():
    runs = [run("warm", 0, [2.0]), run("cold", 0, [3.0], tokens=TOKENS - 1)]
    assert pair_runs(runs) == ()


def test_runs_on_different_text_are_never_compared():
    runs = [run("warm", 0, [2.0], data_hash="a" * 64), run("cold", 0, [3.0], data_hash="b" * 64)]
    why = pending(runs)
    assert "corpus aaaaaaaa" in why
    assert "corpus bbbbbbbb" in why


def test_a_ladder_is_judged_on_its_last_rung():
    # Warm runs of 9 nats on the lower rung, far above every cold run: they must not count.
    lower = [run("warm", 0, [9.0]), run("warm", 1, [9.0])]
    last = [r.model_copy(update={"rung": 1}) for r in target([([1.0], [2.0]), ([1.0], [2.0])])]
    assert verdict(lower + last) == verdict(last)


def test_there_is_no_verdict_while_a_lower_rung_is_unfinished():
    last = [run("cold", seed, [2.0], rung=1) for seed in (0, 1)]
    assert "warm seed 0 is leased" in pending([run("warm", 0, [9.0], state="leased"), *last])


def test_a_ladder_that_broke_below_says_where():
    cold = [run("cold", 0, [2.0], rung=1)]
    assert "warm seed 0 failed" in pending([run("warm", 0, [9.0], state="failed"), *cold])


def test_a_seed_that_failed_is_left_out_and_named():
    runs = target([([1.0], [2.0]), ([1.01], [2.0])])
    runs += [run("warm", 2, [2.0]), run("cold", 2, [9.0], state="failed", diverged=True)]
    v = verdict(runs)
    assert v.seeds == 2
    assert "cold seed 2 diverged" in v.left_out
    assert "cold seed 2 diverged" in v.sentence


def test_a_diverged_warm_run_is_never_a_gain():
    runs = target([([1.0], [2.0]), ([1.01], [2.0])])
    assert verdict(runs).grow
    # The third seed adds no pair, so the interval over two seeds stays below 0.
    runs += [run("warm", 2, [9.0], state="failed", diverged=True), run("cold", 2, [2.0])]
    v = verdict(runs)
    assert not v.grow
    assert "warm run of seed 2 diverged" in v.sentence


EXTREME = st.sampled_from([0.0, 1e-300, -1e-300, 5e-324, 2.0, 1e300, -1e300, 1.7e308, -1.7e308])
extreme_curves = st.lists(EXTREME | st.floats(allow_nan=False, allow_infinity=False), min_size=1,
                          max_size=5)  # fmt: skip


@given(st.lists(st.tuples(extreme_curves, extreme_curves), min_size=1, max_size=4))
@example([([1.7e308], [-1.7e308]), ([-1.7e308], [1.7e308])])  # neither sums nor squares are finite
@example([([0.0, -1e300], [-1.7e308]), ([1.7e308, -1.7e308], [1e-300])])
@example([([5e-324, 0.0], [0.0])])  # half of the smallest float is 0
def test_losses_of_any_size_have_a_verdict_in_finite_numbers(pairs):
    v = verdict(target(pairs))
    json.dumps(v.model_dump(), allow_nan=False)
    assert len(v.sentence) < 1000
    if v.interval_nats:
        assert v.interval_nats.low <= v.difference_nats <= v.interval_nats.high


@given(arms.filter(lambda pairs: len(pairs) > 1))
def test_scaling_changes_no_bit_of_a_verdict_on_real_losses(pairs):
    v = verdict(target(pairs))
    differences = [p.difference_nats for p in v.pairs]
    # `mean` divides by a power of two and multiplies back: the result equals the plain mean.
    assert v.difference_nats == fmean(differences)
