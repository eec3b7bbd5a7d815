"""Training: resuming bit for bit, the order of events, seeds, and growth."""

import dataclasses
import itertools
import math

import pytest
import torch

from warmcore.checkpoint.checkpoint import CheckpointCorruptError, load_checkpoint
from warmcore.corpus.prepare import prepare_corpus
from warmcore.growth.growth import Growth
from warmcore.specs import CheckpointRef, GrowthSpec
from warmcore.specs.schedule import spread_evaluations
from warmcore.training import training as train_module
from warmcore.training.batches import read_train_batch
from warmcore.training.events import EvaluationEvent, StepEvent
from warmcore.training.optimizer import optimizer_tensors
from warmcore.training.training import Training

NUM_STEPS = 12


def timeless(events):
    return [dataclasses.replace(event, seconds=0.0) for event in events]


def weights_of(training):
    return {name: tensor.clone() for name, tensor in training.model.state_dict().items()}


def assert_equal_weights(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


@pytest.fixture(scope="module")
def base(run_spec, corpus, tmp_path_factory):
    training = Training.start(run_spec(steps=30, width=16), corpus)
    list(training.train_to_end())
    return training.save(tmp_path_factory.mktemp("base") / "checkpoint")


def growth_of(saved, **options):
    return GrowthSpec(base=CheckpointRef(uri=str(saved.path), hash=saved.hash), **options)


@pytest.fixture(params=["cold", "clone with its optimizer, rewarmed", "shrink and perturb"])
def spec_and_base(request, run_spec, base):
    wide = {"width": 32, "base_width": 16}
    match request.param:
        case "cold":
            averages = {"ema_half_life": 0.2, "swa_fraction": 0.5}
            return run_spec(steps=NUM_STEPS, **averages), None
        case "shrink and perturb":
            return run_spec(steps=NUM_STEPS, growth=growth_of(base), **wide), base.path
    growth = growth_of(base, operator="clone", optimizer_state="transfer")
    rewarm = {"schedule": "rewarm", "warmup_fraction": 0.3, "accumulate": 2}
    return run_spec(steps=NUM_STEPS, growth=growth, **rewarm, **wide), base.path


@pytest.mark.parametrize("num_taken", range(NUM_STEPS + 4 + 1))
def test_a_run_resumed_at_any_event_is_the_uninterrupted_one(
    spec_and_base, num_taken, corpus, tmp_path
):
    spec, base_path = spec_and_base
    whole = Training.start(spec, corpus, base=base_path)
    expected = timeless(whole.train_to_end())
    assert len(expected) == NUM_STEPS + 4
    first = Training.start(spec, corpus, base=base_path)
    taken = timeless(itertools.islice(first.train_to_end(), num_taken))
    second = Training.resume(spec, corpus, first.save(tmp_path / "checkpoint").path)
    assert second.base_hash == whole.base_hash
    assert taken + timeless(second.train_to_end()) == expected
    assert_equal_weights(weights_of(whole), weights_of(second))
    assert whole.averages.tensors.keys() == second.averages.tensors.keys()
    for name, tensors in whole.averages.tensors.items():
        assert_equal_weights(tensors, second.averages.tensors[name])
    assert second.last_val_loss_nats == whole.last_val_loss_nats


def test_stopping_and_going_on_without_saving_changes_nothing(run_spec, corpus):
    expected = timeless(Training.start(run_spec(), corpus).train_to_end())
    training = Training.start(run_spec(), corpus)
    taken = []
    while len(taken) < len(expected):
        taken += timeless(itertools.islice(training.train_to_end(), 1))
    assert taken == expected
    assert list(training.train_to_end()) == []


def test_a_step_is_followed_by_its_evaluation_and_evaluation_0_precedes_training(run_spec, corpus):
    events = list(Training.start(run_spec(steps=10), corpus).train_to_end())
    kinds = "".join("e" if isinstance(event, EvaluationEvent) else "s" for event in events)
    assert kinds == "esssessssessse"
    evaluations = [e for e in events if isinstance(e, EvaluationEvent)]
    assert [(e.evaluation, e.step) for e in evaluations] == [(0, 0), (1, 3), (2, 7), (3, 10)]
    steps = [e for e in events if isinstance(e, StepEvent)]
    assert [(e.step, e.tokens) for e in steps] == [(s, s * 64) for s in range(1, 11)]
    assert evaluations[0].val_loss_nats == pytest.approx(math.log(256), 1e-6)


@pytest.mark.parametrize(
    ("total", "evaluations", "steps"),
    [(8, 4, [0, 2, 4, 6, 8]), (1, 8, [0, 1]), (3, 8, [0, 1, 2, 3]), (100, 1, [0, 100])],
)
def test_evaluations_are_evenly_spaced_and_the_last_is_at_the_end(total, evaluations, steps):
    assert spread_evaluations(total, evaluations) == steps


def test_training_learns(run_spec, corpus):
    *_, last = Training.start(run_spec(steps=150, batch_size=8), corpus).train_to_end()
    # The entropy of single bytes is about 3.4 nats: the model has learned more than frequencies.
    assert last.val_loss_nats < 3.3


def test_a_seed_gives_one_curve_and_another_seed_another(run_spec, corpus):
    curves = [timeless(Training.start(run_spec(seed=s), corpus).train_to_end()) for s in (0, 0, 1)]
    assert curves[0] == curves[1]
    assert curves[0] != curves[2]


def test_training_does_not_touch_the_global_generator(run_spec, corpus):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    list(Training.start(run_spec(), corpus).train_to_end())
    assert torch.equal(before, torch.get_rng_state())


def test_grown_with_nothing_of_the_base_a_run_is_the_cold_run(run_spec, corpus, base):
    wide = {"width": 32, "base_width": 16, "seed": 4}
    growth = growth_of(base, operator="shrink_perturb", shrink=0.0, perturb=1.0)
    cold = Training.start(run_spec(**wide), corpus)
    warm = Training.start(run_spec(**wide, growth=growth), corpus, base=base.path)
    assert_equal_weights(weights_of(cold), weights_of(warm))
    assert timeless(cold.train_to_end()) == timeless(warm.train_to_end())
    assert (cold.base_hash, warm.base_hash) == (None, base.hash)


def test_warm_and_cold_runs_of_a_seed_read_the_same_batches_and_another_seed_others(
    run_spec, corpus, base, monkeypatch
):
    wide = {"width": 32, "base_width": 16}
    read = []

    def record_batch(*args, **keywords):
        read[-1].append(read_train_batch(*args, **keywords))
        return read[-1][-1]

    monkeypatch.setattr(train_module, "read_train_batch", record_batch)
    for seed, growth in ((0, None), (0, growth_of(base)), (1, None)):
        read.append([])
        spec = run_spec(**wide, seed=seed, growth=growth)
        list(Training.start(spec, corpus, base=growth and base.path).train_to_end())
    cold, warm, other = (torch.stack(batches) for batches in read)
    assert torch.equal(cold, warm)
    assert not torch.equal(cold, other)


def test_a_clone_starts_with_its_bases_optimizer_where_that_is_transferred(run_spec, corpus, base):
    growth = growth_of(base, operator="clone", optimizer_state="transfer")
    spec = run_spec(width=32, base_width=16, growth=growth)
    warm = Training.start(spec, corpus, base=base.path)
    source = load_checkpoint(base.path)
    plan = Growth.plan(source.manifest.model, spec.model, growth, torch.Generator())
    expected = dict(plan.grow_moments(source.optimizer))
    found = optimizer_tensors(warm.optimizer)
    assert_equal_weights(found, expected)
    assert found["final_norm.weight.step"] == base.step


def test_a_clone_starts_at_its_bases_loss(run_spec, corpus, base):
    growth = growth_of(base, operator="clone")
    spec = run_spec(width=32, base_width=16, growth=growth)
    first = next(Training.start(spec, corpus, base=base.path).train_to_end())
    assert first.val_loss_nats == pytest.approx(base.val_loss_nats, rel=1e-5)


def test_a_base_with_another_hash_is_refused(run_spec, corpus, base):
    growth = GrowthSpec(base=CheckpointRef(uri="x", hash="0" * 64))
    spec = run_spec(width=32, base_width=16, growth=growth)
    with pytest.raises(CheckpointCorruptError, match=f"expected {'0' * 64}, found {base.hash}"):
        Training.start(spec, corpus, base=base.path)


def test_growth_and_its_base_come_together(run_spec, corpus, base):
    with pytest.raises(ValueError, match="give both"):
        Training.start(run_spec(), corpus, base=base.path)
    with pytest.raises(ValueError, match="give both"):
        Training.start(run_spec(growth=growth_of(base)), corpus)


def test_a_checkpoint_of_another_spec_is_refused_naming_the_field(run_spec, corpus, tmp_path):
    path = Training.start(run_spec(lr=0.01), corpus).save(tmp_path / "a").path
    with pytest.raises(ValueError, match=r"train\.lr is 0\.01, not 0\.02"):
        Training.resume(run_spec(lr=0.02), corpus, path)
    with pytest.raises(ValueError, match="seed is 0, not 1"):
        Training.resume(run_spec(lr=0.01, seed=1), corpus, path)


def test_a_checkpoint_of_other_data_is_refused(run_spec, corpus, data_spec, cache, tmp_path):
    path = Training.start(run_spec(), corpus).save(tmp_path / "a").path
    other = prepare_corpus(data_spec.model_copy(update={"val_fraction": 0.3}), cache)
    with pytest.raises(ValueError, match=f"{corpus.data_hash}, not {other.data_hash}"):
        Training.resume(run_spec(), other, path)
