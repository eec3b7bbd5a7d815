"""Muon: muP scaling, state and growth."""

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from warmcore.coord_check.check import CheckSetup, check_axis
from warmcore.growth.from_checkpoint import grow_checkpoint
from warmcore.model.decoder import Decoder, init_weights_
from warmcore.model.mup import GAINS, factors, role_of
from warmcore.specs import CheckpointRef, GrowthSpec, ModelSpec, TrainSpec
from warmcore.training import optimizer as optim_module
from warmcore.training.events import StepEvent
from warmcore.training.optimizer import ADAM_KEYS, ROLES, build_optimizer, optimizer_tensors
from warmcore.training.training import Training

FLAT = 0.05
MUON = TrainSpec(optimizer="muon", lr=0.01, weight_decay=0.3, muon_lr_ratio=2.0)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize(("parametrization", "base_width"), [("mup", 64), ("standard", 16)])
def test_every_factor_is_one_at_the_base_width_and_under_standard(
    role, parametrization, base_width
):
    model = ModelSpec(
        width=64, depth=1, head_dim=16, base_width=base_width, parametrization=parametrization
    )
    row = factors(role, model, "muon")
    assert (row.lr, row.eps, row.weight_decay) == (1, 1, 0 if role in GAINS else 1)


def test_the_table_at_four_times_the_base_width_and_twice_its_depth():
    model = ModelSpec(width=256, depth=4, base_width=64, base_depth=2)
    muon = factors("hidden", model, "muon")
    assert (muon.lr, muon.weight_decay, muon.eps) == (1 / 2, 2, 1 / 2)
    assert muon.init_std == factors("hidden", model).init_std
    for role in ROLES[:1] + ROLES[2:]:
        assert factors(role, model, "muon") == factors(role, model)


def updates_of(model, train, scale=1.0):
    """Return the update of each hidden matrix by a step without decay, for random gradients."""
    generator = torch.Generator().manual_seed(0)
    decoder = init_weights_(Decoder(model, context=4), model, generator)
    before = {name: p.detach().clone() for name, p in decoder.named_parameters()}
    for parameter in decoder.parameters():
        parameter.grad = scale * torch.randn(parameter.shape, generator=generator)
    build_optimizer(
        decoder.named_parameters(), model, train.model_copy(update={"weight_decay": 0.0})
    ).step()
    after = dict(decoder.named_parameters())
    return {n: after[n].detach() - before[n] for n in before if role_of(n) == "hidden"}


@given(
    st.sampled_from([1, 2, 4, 8]),
    st.sampled_from([1, 2]),
    st.sampled_from([1, 2, 3]),
    st.sampled_from([1e-3, 1.0, 1e3]),
)
def test_an_update_is_orthogonal_and_of_one_spectral_norm_at_every_width(m, group, depth, scale):
    base = ModelSpec(width=16, depth=1, head_dim=8, group_size=group, base_width=16, base_depth=1)
    model = base.model_copy(update={"width": 16 * m, "depth": depth})
    for name, update in updates_of(model, MUON, scale).items():
        at_base = [size / m for size in update.shape]
        expected = MUON.lr * MUON.muon_lr_ratio * 0.2 * math.sqrt(max(at_base))
        values = torch.linalg.svdvals(update) / expected
        # Newton-Schulz in five steps leaves singular values within 0.5..1.5, by design.
        assert values.max() < 1.3, name
        assert values.median() > 0.5, name


def test_at_the_base_an_update_has_the_rms_of_adamws_steady_state():
    model = ModelSpec(width=64, depth=1, head_dim=16)
    for update in updates_of(model, TrainSpec(optimizer="muon", lr=0.01)).values():
        assert update.square().mean().sqrt().item() == pytest.approx(0.2 * 0.01, rel=0.2)


@pytest.mark.parametrize("name", ["muon_lr_ratio", "muon_momentum"])
def test_what_does_nothing_with_adamw_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} 0.5 does nothing with optimizer adamw; set"):
        TrainSpec(**{name: 0.5})


# State


def losses(training):
    return [event.loss_nats for event in training.train_to_end() if isinstance(event, StepEvent)]


@pytest.mark.parametrize("num_taken", [0, 6])
def test_a_run_resumed_is_the_uninterrupted_one_bit_for_bit(num_taken, run_spec, corpus, tmp_path):
    spec = run_spec(optimizer="muon", depth=2, base_width=8)
    expected = losses(Training.start(spec, corpus))
    first = Training.start(spec, corpus)
    taken = [
        event.loss_nats
        for event in itertools.islice(first.train_to_end(), num_taken)
        if isinstance(event, StepEvent)
    ]
    second = Training.resume(spec, corpus, first.save(tmp_path / "checkpoint").path)
    assert taken + losses(second) == expected
    assert expected != losses(Training.start(run_spec(depth=2, base_width=8), corpus))


@pytest.fixture(scope="module")
def base(run_spec, corpus, tmp_path_factory):
    training = Training.start(run_spec(steps=12, depth=2, optimizer="muon"), corpus)
    list(training.train_to_end())
    return training.save(tmp_path_factory.mktemp("base") / "checkpoint")


@pytest.fixture
def grown_run(run_spec, base):
    def make(optimizer="muon", **options):
        growth = GrowthSpec(base=CheckpointRef(uri=str(base.path), hash=base.hash), **options)
        shape = {"width": 32, "depth": 4, "base_width": 16, "base_depth": 2}
        return run_spec(steps=4, growth=growth, optimizer=optimizer, **shape)

    return make


@pytest.mark.parametrize(
    ("operator", "rule"),
    [
        ("clone", "transfer"),
        ("net2net", "transfer_old_reset_new"),
        ("zero_pad", "transfer_old_reset_new"),
        ("shrink_perturb", "reset"),
    ],
)
def test_growth_on_disk_is_growth_in_memory(operator, rule, grown_run, base, corpus, tmp_path):
    run = grown_run(operator=operator, optimizer_state=rule)
    saved = grow_checkpoint(base.path, tmp_path / "grown", run=run)
    started = Training.start(run, corpus, base=base.path)
    assert started.save(tmp_path / "started").hash == saved.hash
    assert losses(Training.resume(run, corpus, saved.path)) == losses(started)


def test_hidden_matrices_have_a_momentum_and_all_else_adams_moments(run_spec, corpus):
    training = Training.start(run_spec(optimizer="muon"), corpus)
    list(training.train_to_end())
    keys = {}
    for entry in optimizer_tensors(training.optimizer):
        name, key = entry.rsplit(".", 1)
        keys.setdefault(name, set()).add(key)
    for name, found in keys.items():
        assert found == ({"momentum_buffer"} if role_of(name) == "hidden" else set(ADAM_KEYS))


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_state_goes_on_only_in_the_same_optimizer(optimizer, grown_run, base, corpus):
    run = grown_run(optimizer, operator="clone", optimizer_state="transfer")
    if optimizer == "muon":
        Training.start(run, corpus, base=base.path)
        return
    message = "transfer needs one optimizer in base and target: muon is not adamw; use reset"
    with pytest.raises(ValueError, match=message):
        Training.start(run, corpus, base=base.path)
    Training.start(grown_run("adamw", operator="clone"), corpus, base=base.path)


# Coordinate checks


def setup_of(corpus, num_seeds):
    # At ten times AdamW's update, three steps outweigh the initial weights.
    train = TrainSpec(lr=4e-3, batch_size=8, optimizer="muon", muon_lr_ratio=10.0)
    return CheckSetup(
        tokens=corpus.train, train=train, context=32, num_steps=3, num_seeds=num_seeds
    )


def width_slopes(corpus, num_seeds, *widths):
    model = ModelSpec(width=128, depth=2, head_dim=16, base_width=128)
    return check_axis(setup_of(corpus, num_seeds), model, "width", widths).last_slopes


def scaled_otherwise(monkeypatch, lr_factor):
    def other(role, model, optimizer):
        row = factors(role, model, optimizer)
        return dataclasses.replace(row, lr=lr_factor(model)) if role == "hidden" else row

    monkeypatch.setattr(optim_module, "factors", other)


def test_activations_do_not_depend_on_width(corpus):
    measured = width_slopes(corpus, 2, 128, 256, 512)
    assert all(abs(slope) < FLAT for slope in measured.values()), measured


@pytest.mark.parametrize(
    ("lr_factor", "sign"),
    [(lambda model: 1.0, 1), (lambda model: 1 / model.width_multiplier, -1)],
    ids=["the library's own", "AdamW's 1/m"],
)
def test_with_another_scale_they_do(lr_factor, sign, corpus, monkeypatch):
    scaled_otherwise(monkeypatch, lr_factor)
    measured = width_slopes(corpus, 1, 128, 256)
    assert all(sign * measured[kind] > 2 * FLAT for kind in ("ffn", "stream")), measured


def depth_slopes_under(parametrization, corpus, num_seeds):
    # A small init: by design the sum of L initial branches falls as 1/sqrt(L).
    model = ModelSpec(
        width=64,
        depth=4,
        head_dim=16,
        base_depth=4,
        parametrization=parametrization,
        init_std=0.02,
    )
    return check_axis(setup_of(corpus, num_seeds), model, "depth", (4, 8, 16, 32)).last_slopes


def test_activations_do_not_depend_on_depth(corpus):
    measured = depth_slopes_under("mup", corpus, 2)
    assert all(abs(slope) < FLAT for slope in measured.values()), measured


def test_under_standard_parametrization_the_residual_stream_grows_with_depth(corpus):
    measured = depth_slopes_under("standard", corpus, 1)
    assert measured["stream"] > 4 * FLAT, measured
    assert measured["unembedding"] > 4 * FLAT, measured
