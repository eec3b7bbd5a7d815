"""The states of studies and runs, their transitions, and the plan of a study: laws."""

from dataclasses import replace
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.lifecycle import (
    FINAL_RUN_STATES,
    LIVE_RUN_STATES,
    RUN_TRANSITIONS,
    STUDY_TRANSITIONS,
    retry_delay_seconds,
    source_states,
    state_after_attempt,
)
from service.protocol import Outcome, RunState, StudyState
from service.specs.study import StudySpec
from service.studies.plan import (
    Base,
    End,
    NewTarget,
    TargetFact,
    derive_target_seeds,
    plan_next_step,
)
from warmcore.specs import CheckpointRef, derive_seed

outcomes = st.sampled_from(get_args(Outcome))


def test_every_state_has_its_row():
    assert set(RUN_TRANSITIONS) == set(get_args(RunState))
    assert set(STUDY_TRANSITIONS) == set(get_args(StudyState))
    assert set(FINAL_RUN_STATES) == {"succeeded", "pruned", "failed", "cancelled"}
    assert set(LIVE_RUN_STATES) == {"queued", "leased"}


def test_a_study_moves_to_a_state_only_from_its_sources():
    assert set(source_states("paused")) == {"active"}
    assert set(source_states("active")) == {"paused"}
    assert set(source_states("cancelled")) == {"active", "paused"}


@given(outcomes, st.booleans(), st.integers(0, 5), st.integers(1, 5))
def test_an_attempt_ends_only_where_the_table_allows(outcome, retryable, failures, most):
    state = state_after_attempt(outcome, retryable=retryable, failures=failures, max_attempts=most)
    assert state in RUN_TRANSITIONS["leased"]


@given(st.booleans(), st.integers(1, 9), st.integers(1, 9))
def test_a_failed_attempt_is_tried_again_only_while_attempts_are_left(retryable, failures, most):
    state = state_after_attempt("failed", retryable=retryable, failures=failures, max_attempts=most)
    assert (state == "queued") == (retryable and failures < most)


@given(st.integers(1, 1000))
def test_retries_wait_longer_each_time_and_five_minutes_at_most(failures):
    assert retry_delay_seconds(failures) <= retry_delay_seconds(failures + 1) <= 300


@given(st.integers(), st.integers(), st.integers())
def test_derived_seeds_depend_on_every_part(a, b, c):
    assert 0 <= derive_seed(a, b) < 2**63
    assert (derive_seed(a, b) == derive_seed(a, c)) == (b == c)


def spec_of(rungs, control, seeds):
    ladder = [{"width": 32 + 16 * (r + 1)} for r in range(rungs)]
    return StudySpec.model_validate(
        {
            "name": "s",
            "data": {"source": "stdlib"},
            "proxy": {"width": 32, "depth": 1, "head_dim": 16},
            "ladder": ladder,
            "search_space": {"lr": {"type": "float", "low": 0.1, "high": 0.2}},
            "hpo": {"trials": 1},
            "warmstart": {"control": control, "seeds": seeds},
        }
    )


def base(i):
    ref = CheckpointRef(uri=f"file:///{i}", hash=f"{i:064x}")
    return Base(checkpoint_id=i, checkpoint=ref, params={"lr": 0.1})


@settings(deadline=None)
@given(st.integers(0, 3), st.booleans(), st.integers(1, 3), st.randoms(use_true_random=False))
def test_a_plan_ends_enqueues_each_target_once_and_grows_only_from_the_rung_below(
    rungs, control, seeds, random
):
    spec, targets, enqueued = spec_of(rungs, control, seeds), [], []
    for _ in range(100):
        step = plan_next_step(spec, base(0), tuple(targets), any_succeeded=True)
        if isinstance(step, End):
            break
        for new in step or ():
            enqueued.append(new)
            targets.append(
                TargetFact(
                    rung=new.rung, arm=new.arm, seed=new.seed, branch=0, state="queued", base=None
                )
            )
        live = [i for i, t in enumerate(targets) if t.state == "queued"]
        done = random.choice(live)
        state = random.choice(["succeeded", "succeeded", "failed"])
        made = base(done + 1) if state == "succeeded" else None
        targets[done] = replace(targets[done], state=state, base=made)
    assert isinstance(step, End)
    keys = [(t.rung, t.arm, t.seed) for t in enqueued]
    assert len(keys) == len(set(keys)) <= seeds * (rungs + control)
    for new in enqueued:
        check_base(new, targets, rungs)


def check_base(new: NewTarget, targets, rungs):
    if new.arm == "cold":
        assert (new.base, new.rung) == (None, rungs - 1)
    elif new.rung == 0:
        assert new.base == base(0)
    else:
        below = [t for t in targets if (t.rung, t.arm, t.seed) == (new.rung - 1, "warm", new.seed)]
        assert [t.base for t in below] == [new.base]


def test_without_a_base_a_study_fails_and_without_targets_it_completes():
    def step(rungs, best, *, any_succeeded):
        return plan_next_step(spec_of(rungs, True, 1), best, (), any_succeeded=any_succeeded)

    without = "no trial succeeded with a checkpoint to grow from"
    assert step(1, None, any_succeeded=True) == End(state="failed", reason=without)
    assert step(0, None, any_succeeded=True) == End(state="completed")
    assert step(0, None, any_succeeded=False) == End(state="failed", reason="no trial succeeded")


@pytest.mark.parametrize("count", [1, 5])
def test_target_seeds_are_distinct_and_depend_on_the_study(count):
    assert len(set(derive_target_seeds(0, count))) == count
    assert not set(derive_target_seeds(0, count)) & set(derive_target_seeds(1, count))
