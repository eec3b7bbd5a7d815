"""Averages equal their formulas, and do not influence the run."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import nn

from warmcore.checkpoint.checkpoint import load_checkpoint
from warmcore.huggingface.export import WEIGHTS, export_hf
from warmcore.huggingface.tensors import folded_factor, hf_name
from warmcore.model.decoder import Decoder
from warmcore.specs import CheckpointRef, GrowthSpec, TrainSpec
from warmcore.training.averages import Averages
from warmcore.training.evaluate import val_loss_nats
from warmcore.training.events import EvaluationEvent, StepEvent
from warmcore.training.optimizer import optimizer_tensors
from warmcore.training.training import Training

BOTH = {"ema_half_life": 0.1, "swa_fraction": 0.5}
lengths, half_lives = st.integers(2, 60), st.floats(0.01, 0.9)


class Path(nn.Module):
    """Weights that equal the unit vector e_t after step t.

    Element t of an average is then the weight of step t in the average.
    """

    def __init__(self, num_steps):
        super().__init__()
        self.point = nn.Parameter(torch.zeros(num_steps, dtype=torch.float64))

    def go(self, averages):
        for step in range(1, len(self.point) + 1):
            with torch.no_grad():
                self.point.zero_()[step - 1] = 1.0
            averages.update_averages_(self, step)
        return {name: tensors["point"] for name, tensors in averages.tensors.items()}


def weights_of_steps(num_steps, **options):
    averages = Averages(train=TrainSpec(**options), num_steps=num_steps)
    return Path(num_steps).go(averages)


@given(lengths, half_lives)
def test_steps_up_to_t_weigh_their_share_to_a_power_that_halves_at_the_half_life(
    num_steps, half_life
):
    weights = weights_of_steps(num_steps, ema_half_life=half_life)["ema"]
    power = math.log(0.5) / math.log(1 - half_life)
    shares = torch.arange(1, num_steps + 1, dtype=torch.float64) / num_steps
    assert torch.allclose(weights.cumsum(0), shares**power, rtol=0, atol=1e-12)
    assert (1 - half_life) ** power == pytest.approx(0.5)


@given(lengths, half_lives)
def test_an_exponential_average_does_not_know_the_budget(num_steps, half_life):
    longer = Averages(train=TrainSpec(ema_half_life=half_life), num_steps=10 * num_steps)
    expected = weights_of_steps(num_steps, ema_half_life=half_life)["ema"]
    assert torch.equal(Path(num_steps).go(longer)["ema"], expected)


@given(lengths, st.floats(0.01, 1.0))
def test_the_last_steps_weigh_the_same_in_an_equal_average(num_steps, fraction):
    count = math.ceil(fraction * num_steps)
    expected = torch.zeros(num_steps, dtype=torch.float64)
    expected[num_steps - count :] = 1 / count
    weights = weights_of_steps(num_steps, swa_fraction=fraction)["swa"]
    assert torch.allclose(weights, expected, rtol=0, atol=1e-12)


def test_averages_change_no_bit_of_the_run(run_spec, corpus):
    plain = Training.start(run_spec(steps=12), corpus)
    averaged = Training.start(run_spec(steps=12, **BOTH), corpus)
    for one, other in zip(plain.train_to_end(), averaged.train_to_end(), strict=True):
        if isinstance(one, StepEvent):
            numbers = (one.loss_nats, one.grad_norm, one.lr)
            assert (other.loss_nats, other.grad_norm, other.lr) == numbers
        else:
            assert other.val_loss_nats == one.val_loss_nats
            assert (one.ema_val_loss_nats, one.swa_val_loss_nats) == (None, None)
    for tensors in (lambda t: t.model.state_dict(), lambda t: optimizer_tensors(t.optimizer)):
        a, b = tensors(plain), tensors(averaged)
        assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def averaged(run_spec, corpus, tmp_path_factory):
    """Return a finished run with both averages: training, events, weights by step, checkpoint."""
    training, events, path = Training.start(run_spec(steps=30, **BOTH), corpus), [], []
    for event in training.train_to_end():
        events.append(event)
        if isinstance(event, StepEvent):
            path.append({n: p.detach().clone() for n, p in training.model.named_parameters()})
    saved = training.save(tmp_path_factory.mktemp("averaged") / "checkpoint")
    return training, [e for e in events if isinstance(e, EvaluationEvent)], path, saved


def loss_of(training, weights, corpus):
    model = Decoder(training.spec.model, context=training.spec.data.context)
    model.load_state_dict(weights)
    train, data = training.spec.train, training.spec.data
    return val_loss_nats(model, corpus.val, context=data.context, eval_tokens=train.eval_tokens)


def test_averaged_losses_are_those_of_the_averaged_weights(averaged, corpus):
    training, evaluations, path, _ = averaged
    mean = {name: torch.stack([w[name] for w in path[15:]]).mean(0) for name in path[0]}
    last = evaluations[-1]
    assert last.swa_val_loss_nats == pytest.approx(loss_of(training, mean, corpus), rel=1e-5)
    assert last.ema_val_loss_nats == loss_of(training, training.averages.tensors["ema"], corpus)
    assert len({last.val_loss_nats, last.ema_val_loss_nats, last.swa_val_loss_nats}) == 3


def test_an_average_is_evaluated_from_where_it_begins(averaged):
    _, evaluations, _, _ = averaged
    begun = [(e.step, e.ema_val_loss_nats is None, e.swa_val_loss_nats is None)
             for e in evaluations]  # fmt: skip
    assert begun == [(0, True, True), (10, False, True), (20, False, False), (30, False, False)]


def test_a_checkpoint_holds_the_weights_and_their_averages(averaged):
    training, _, path, saved = averaged
    loaded = load_checkpoint(saved.path)
    assert set(loaded.averages) == {"ema", "swa"}
    for name, tensor in path[-1].items():
        assert torch.equal(loaded.weights[name], tensor)
        for average in ("ema", "swa"):
            assert torch.equal(
                loaded.averages[average][name], training.averages.tensors[average][name]
            )


def test_weights_are_put_back_when_their_averages_evaluation_fails(averaged):
    training = averaged[0]
    before = {n: t.clone() for n, t in training.model.state_dict().items()}
    with (
        pytest.raises(KeyboardInterrupt),
        training.averages.swap_with_weights("swa", training.model),
    ):
        raise KeyboardInterrupt
    assert all(torch.equal(t, before[n]) for n, t in training.model.state_dict().items())


def grown(run_spec, corpus, saved, base_weights):
    base = CheckpointRef(uri=str(saved.path), hash=saved.hash)
    growth = GrowthSpec(base=base, operator="clone", base_weights=base_weights)
    spec = run_spec(width=32, base_width=16, growth=growth)
    return next(Training.start(spec, corpus, base=saved.path).train_to_end()).val_loss_nats


@pytest.mark.parametrize("name", ["ema", "swa"])
def test_a_clone_of_an_average_starts_at_the_averages_loss(name, averaged, run_spec, corpus):
    _, evaluations, _, saved = averaged
    expected = getattr(evaluations[-1], f"{name}_val_loss_nats")
    assert grown(run_spec, corpus, saved, name) == pytest.approx(expected, rel=1e-5)
    assert grown(run_spec, corpus, saved, "raw") != pytest.approx(expected, rel=1e-5)


def test_growing_an_average_that_the_base_does_not_have_is_refused(run_spec, corpus, tmp_path):
    training = Training.start(run_spec(ema_half_life=0.1), corpus)
    next(training.train_to_end())
    saved = training.save(tmp_path / "before-the-first-step")
    for name, found in (("ema", "raw"), ("swa", "raw")):
        with pytest.raises(ValueError, match=f"no {name} weights, but {found}"):
            grown(run_spec, corpus, saved, name)


@pytest.mark.parametrize("name", ["ema", "swa"])
def test_an_average_is_exported_in_place_of_the_weights(name, averaged, tmp_path):
    training, _, _, saved = averaged
    export_hf(saved.path, tmp_path / "theirs", weights=name)
    theirs = load_file(tmp_path / "theirs" / WEIGHTS)
    for key, tensor in training.averages.tensors[name].items():
        scale = folded_factor(key, training.spec.model)
        assert torch.equal(theirs[hf_name(key)], tensor * scale)


@pytest.mark.parametrize("field", [{"ema_half_life": 0}, {"ema_half_life": 1},
                                   {"swa_fraction": 0}, {"swa_fraction": 1.1}])  # fmt: skip
def test_averages_of_nothing_are_refused(field):
    with pytest.raises(ValidationError):
        TrainSpec(**field)
