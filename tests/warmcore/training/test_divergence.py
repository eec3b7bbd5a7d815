"""Divergence: a run that is lost ends, and a run that only learns slowly goes on."""

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from warmcore.checkpoint.checkpoint import load_checkpoint
from warmcore.checkpoint.progress import LossWatch
from warmcore.specs import CheckpointRef, GrowthSpec
from warmcore.training.divergence import explain_broken_step, explain_divergence
from warmcore.training.events import DivergedEvent, EvaluationEvent, StepEvent
from warmcore.training.training import Training

VOCAB = 256
KNOWS_NOTHING = math.log(VOCAB)


def verdicts(losses, num_steps=None):
    watch, seen = LossWatch(), []
    for loss in losses:
        watch = watch.with_loss(loss, VOCAB)
        seen.append(explain_divergence(watch, num_steps or len(losses)))
    return seen


@given(st.integers(1, 1000), st.floats(0.11, 100))
def test_a_loss_above_its_start_for_good_is_noticed_after_the_patience(num_steps, rise):
    patience = max(20, math.ceil(num_steps / 10))
    seen = verdicts([5.0] + [KNOWS_NOTHING + rise] * patience, num_steps)
    assert seen[:-1] == [None] * patience
    assert "for" in seen[-1]


@given(st.integers(20, 1000), st.floats(0.2, 100))
def test_one_step_back_under_the_start_begins_the_count_again(num_steps, rise):
    patience = max(20, math.ceil(num_steps / 10))
    bad = [KNOWS_NOTHING + rise] * (patience - 1)
    assert not any(verdicts([5.0, *bad, KNOWS_NOTHING, *bad], num_steps))


@given(st.lists(st.floats(0.5, KNOWS_NOTHING), min_size=1, max_size=300))
def test_a_warm_start_may_lose_all_it_knew(losses):
    assert not any(verdicts([0.4, *losses], 10))


@given(st.lists(st.floats(9.0, 9.09), min_size=30, max_size=60))
def test_a_noisy_start_above_knowing_nothing_is_no_divergence(losses):
    assert not any(verdicts([9.0, *losses]))


@pytest.mark.parametrize(
    ("loss", "norm", "reason"),
    [
        (math.nan, 1.0, "loss is nan"),
        (math.inf, 1.0, "loss is inf"),
        (2.0, math.inf, "gradient norm is inf"),
        (2.0, math.nan, "gradient norm is nan"),
        (2.0, 1e30, None),
    ],
)
def test_numbers_that_are_not_finite_are_named(loss, norm, reason):
    assert explain_broken_step(loss, norm) == reason


def test_a_broken_step_is_not_applied_and_what_is_saved_is_good(run_spec, corpus, tmp_path):
    training = Training.start(run_spec(), corpus)
    events = training.train_to_end()
    while training.step < 3:
        next(events)
    before = {name: t.clone() for name, t in training.model.state_dict().items()}

    def poison(gradient):
        return gradient * math.inf

    training.model.embedding.weight.register_hook(poison)
    assert next(events) == DivergedEvent(
        step=3, tokens=training.tokens, reason="gradient norm is nan"
    )
    assert list(events) == []
    weights = load_checkpoint(training.save(tmp_path / "a").path).weights
    assert all(torch.equal(weights[name], before[name]) for name in before)


def test_a_validation_loss_that_is_not_finite_is_a_divergence(run_spec, corpus):
    training = Training.start(run_spec(), corpus)
    with torch.no_grad():
        training.model.final_norm.weight.fill_(math.nan)
    assert [event.reason for event in training.train_to_end()] == ["validation loss is nan"]


@pytest.fixture
def too_high(run_spec):
    return run_spec(steps=60, lr=10.0, grad_clip=None)


def test_a_much_too_high_learning_rate_is_noticed(too_high, corpus):
    *events, last = Training.start(too_high, corpus).train_to_end()
    assert isinstance(last, DivergedEvent)
    assert "for 20 steps in a row" in last.reason
    assert last.step < 40
    assert all(math.isfinite(event.loss_nats) for event in events if isinstance(event, StepEvent))


def test_patience_runs_on_over_a_resumption(too_high, corpus, tmp_path):
    whole = Training.start(too_high, corpus)
    *_, expected = whole.train_to_end()
    first = Training.start(too_high, corpus)
    list(itertools.takewhile(lambda _: first.step < 15, first.train_to_end()))
    second = Training.resume(too_high, corpus, first.save(tmp_path / "a").path)
    *_, last = second.train_to_end()
    assert second.step == whole.step
    assert last == expected


def test_a_warm_start_that_loses_much_of_what_it_knew_is_no_divergence(run_spec, corpus, tmp_path):
    train = {"width": 16, "base_width": 16, "lr": 0.02}
    base = Training.start(run_spec(steps=150, **train), corpus)
    *_, trained = base.train_to_end()
    saved = base.save(tmp_path / "base")
    growth = GrowthSpec(
        operator="clone", base=CheckpointRef(uri=str(saved.path), hash=saved.hash), noise=0.1
    )
    warm = run_spec(steps=60, growth=growth, **(train | {"width": 32, "lr": 0.3}))
    events = list(Training.start(warm, corpus, base=saved.path).train_to_end())
    assert not any(isinstance(event, DivergedEvent) for event in events)
    first, *_ = (event.val_loss_nats for event in events if isinstance(event, EvaluationEvent))
    losses = [event.loss_nats for event in events if isinstance(event, StepEvent)]
    # It starts warm, and a rule "above its own first loss" would end it wrongly.
    assert abs(first - trained.val_loss_nats) < 0.3
    assert sum(loss > first + 0.3 for loss in losses) > 20
    assert dataclasses.asdict(events[-1])["step"] == 60
