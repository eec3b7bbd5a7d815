"""Schedules rise, stay and fall as their formulas say, and no step has a rate of 0."""

import math
from typing import get_args

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import ValidationError

from warmcore.specs import CooldownShape, ScheduleName, TrainSpec
from warmcore.specs.schedule import cooldown, cosine, lr_factor

fractions = st.floats(0.0, 0.5)
positive_fractions = st.floats(1e-3, 0.5)
any_schedule = st.sampled_from(get_args(ScheduleName))


@st.composite
def trains(draw, names=any_schedule):
    # `lr_floor` belongs to rewarm alone, and rewarm needs a warmup.
    schedule = draw(names)
    rewarms = schedule == "rewarm"
    return TrainSpec(
        schedule=schedule,
        warmup_fraction=draw(positive_fractions if rewarms else fractions),
        **({"lr_floor": draw(st.floats(0.0, 0.9))} if rewarms else {}),
        cooldown_fraction=draw(fractions),
        cooldown=draw(st.sampled_from(get_args(CooldownShape))),
    )


@given(trains(), st.integers(1, 300))
def test_every_step_trains_and_none_exceeds_the_peak(train, num_steps):
    factors = [lr_factor(step, num_steps, train) for step in range(num_steps)]
    assert all(0 < factor <= 1 for factor in factors)


@given(trains(), st.integers(1, 300))
def test_the_rate_rises_only_in_warmup_and_falls_only_after(train, num_steps):
    factors = [lr_factor(step, num_steps, train) for step in range(num_steps)]
    peak = factors.index(max(factors))
    assert factors[: peak + 1] == sorted(factors[: peak + 1])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)


@given(st.integers(10, 300), fractions)
def test_constant_reaches_the_peak_and_keeps_it(num_steps, warmup):
    train = TrainSpec(schedule="constant", warmup_fraction=warmup)
    first_full = max(0, round(num_steps * warmup + 0.5))
    assert {lr_factor(step, num_steps, train) for step in range(first_full, num_steps)} == {1.0}


@given(trains(names=st.just("wsd")), st.integers(20, 300))
def test_wsd_is_constant_up_to_its_cooldown(train, num_steps):
    # There must be a constant phase.
    assume(train.warmup_fraction + train.cooldown_fraction < 0.9)
    first = num_steps - math.ceil(train.cooldown_fraction * num_steps)
    assert lr_factor(first - 1, num_steps, train) == 1.0
    assert first == num_steps or lr_factor(first, num_steps, train) < 1.0


def test_cooldown_shapes_are_their_formulas():
    assert [cooldown(t, 3, "linear") for t in (0, 1, 2, 3)] == [1.0, 0.75, 0.5, 0.25]
    assert cooldown(1, 3, "1-sqrt") == 1 - 0.25**0.5
    assert cooldown(2, 3, "1-sqrt") == 1 - 0.5**0.5


def test_cosine_is_half_way_down_in_the_middle():
    assert cosine(5, 9) == pytest.approx(0.5)
    assert cosine(9, 9) < 0.03


def test_a_cooldown_over_the_whole_run_starts_below_the_peak_and_ends_above_zero():
    train = TrainSpec(warmup_fraction=0.0, cooldown_fraction=1.0, cooldown="linear")
    # The points t / 5: the ends 1 and 0 are not used.
    assert [lr_factor(step, 4, train) for step in range(4)] == pytest.approx([0.8, 0.6, 0.4, 0.2])


def test_rewarm_rises_linearly_from_its_floor_to_the_peak_and_returns_by_cosine():
    train = TrainSpec(schedule="rewarm", warmup_fraction=0.25, lr_floor=0.2)
    factors = [lr_factor(step, 16, train) for step in range(16)]
    assert factors[:4] == pytest.approx([0.4, 0.6, 0.8, 1.0])
    # 4 steps of warmup and 12 of decay, at the points t / 13.
    decay = [0.2 + 0.8 * (1 + math.cos(math.pi * t / 13)) / 2 for t in range(1, 13)]
    assert factors[4:] == pytest.approx(decay)


@given(trains(names=st.just("rewarm")), st.integers(1, 300))
def test_rewarm_never_falls_below_its_floor_and_reaches_the_peak(train, num_steps):
    factors = [lr_factor(step, num_steps, train) for step in range(num_steps)]
    assert min(factors) >= train.lr_floor
    assert max(factors) == pytest.approx(1.0)


@pytest.mark.parametrize("none", [{"warmup_fraction": 0.0}, {"warmup_steps": 0}])
def test_rewarm_without_a_warmup_is_refused(none):
    with pytest.raises(ValidationError, match=r"needs a warmup; warmup_fraction 0\.01 works"):
        TrainSpec(schedule="rewarm", **none)


def test_a_floor_that_no_schedule_uses_is_refused():
    with pytest.raises(ValidationError, match=r"lr_floor 0\.2 does nothing with schedule wsd"):
        TrainSpec(lr_floor=0.2)
