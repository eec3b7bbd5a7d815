"""Growth in depth, and CompleteP's factors; float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.warmcore.growth.families import (
    COPYING,
    PADDING,
    TOKENS,
    bases,
    grow,
    grow_optimizer,
    logits,
    model_of,
    moments_of,
    relative_gap,
    seeded,
    tensors_of,
    wider,
)
from warmcore.coord_check.check import CheckSetup, check_axis
from warmcore.growth.depth import plan_layers
from warmcore.model.decoder import loss_nats, parameter_shapes
from warmcore.model.mup import factors, multipliers
from warmcore.specs import GrowthOptions, ModelSpec, TrainSpec, growth_rules
from warmcore.training.events import StepEvent
from warmcore.training.optimizer import ROLES
from warmcore.training.training import Training

FLAT = 0.05
OPERATORS = ("stack", "interleave", "identity")


def losses(training):
    return [e.loss_nats for e in training.train_to_end() if isinstance(e, StepEvent)]


def test_the_table_at_four_times_the_base_depth_and_twice_its_width():
    model = ModelSpec(width=128, depth=8, base_width=64, base_depth=2)
    rows = {role: factors(role, model) for role in ROLES}
    assert {role: row.lr for role, row in rows.items()} == {
        "embedding": 1,
        "hidden": 1 / 2,
        "gain": 1,
        "final_gain": 1,
        "unembedding": 1,
    }
    assert [rows[r].eps for r in ROLES] == [1 / 2, 1 / 8, 1 / 8, 1 / 2, 1 / 2]
    assert rows["hidden"].weight_decay == 2
    assert multipliers(model).residual == 1 / 4
    assert multipliers(model.model_copy(update={"parametrization": "standard"})).residual == 1


def test_at_the_base_depth_training_is_the_standard_twins_bit_for_bit(run_spec, corpus):
    scaled = run_spec(depth=2, base_depth=2, base_width=16)
    standard = run_spec(depth=2, parametrization="standard")
    assert losses(Training.start(scaled, corpus)) == losses(Training.start(standard, corpus))


def test_away_from_the_base_depth_training_is_not_the_standard_twins(run_spec, corpus):
    scaled = run_spec(depth=2, base_depth=1, base_width=16)
    standard = run_spec(depth=2, parametrization="standard")
    assert losses(Training.start(scaled, corpus)) != losses(Training.start(standard, corpus))


@pytest.mark.parametrize(
    ("operator", "sources", "new"),
    [
        ("stack", [0, 1, 0, 1], [2, 3]),
        ("interleave", [0, 0, 1, 1], [1, 3]),
        ("identity", [0, 0, 1, 1], [1, 3]),
    ],
)
def test_layers_come_from_the_base_in_the_operators_order(operator, sources, new):
    layers = plan_layers(2, 4, operator)
    assert [layer.source for layer in layers] == sources
    assert [place for place, layer in enumerate(layers) if layer.is_new] == new


@given(st.integers(1, 6), st.integers(0, 9))
def test_identity_keeps_every_base_layer_once_and_in_order_at_any_depth(base, added):
    old = [
        layer.source for layer in plan_layers(base, base + added, "identity") if not layer.is_new
    ]
    assert old == list(range(base))


deepening = st.integers(1, 4)


@given(bases(), deepening)
def test_identity_keeps_the_function_and_the_residual_multiplier_must_be_undone(base, added):
    target, tensors = wider(base, 1, depth=base.depth + added), tensors_of(base)
    options = GrowthOptions(operator="clone", depth_operator="identity")
    grown = grow(tensors, base, target, options, seeded())
    expected = logits(base, tensors)
    assert relative_gap(logits(target, grown), expected) < 1e-9
    # The negative control: without the ratio in the old projections the function changes.
    if target.parametrization == "mup":
        ratio = multipliers(base).residual / multipliers(target).residual
        for name in grown:
            if name.split(".")[-2] in ("o", "down"):
                grown[name] = grown[name] / ratio
        assert relative_gap(logits(target, grown), expected) > 1e-6


@pytest.mark.parametrize("operator", ["stack", "interleave"])
@given(base=bases(), ratio=st.sampled_from([2, 3]))
def test_repeated_layers_are_the_bases_and_the_function_is_not(operator, base, ratio):
    target, tensors = wider(base, 1, depth=ratio * base.depth), tensors_of(base)
    options = GrowthOptions(operator="clone", depth_operator=operator)
    grown = grow(tensors, base, target, options, seeded())
    for place, layer in enumerate(plan_layers(base.depth, target.depth, operator)):
        for name in ("attention.o", "ffn.down", "attention_norm"):
            copy = grown[f"blocks.{place}.{name}.weight"]
            assert torch.equal(copy, tensors[f"blocks.{layer.source}.{name}.weight"])
    assert relative_gap(logits(target, grown), logits(base, tensors)) > 1e-6
    (warning,) = growth_rules.find_warnings(options, base, target)
    assert f"depth_operator {operator} changes the function" in warning


@pytest.mark.parametrize("residual", ["the target's", "the base's"])
def test_stacks_of_small_branches_keep_the_function_to_first_order(residual):
    """k copies that each add 1/k of a layer's output add as much as that layer.

    With the base's multiplier they add k times as much: the negative control.
    """
    base = ModelSpec(width=8, depth=2, head_dim=4, vocab_size=7)
    target, tensors = wider(base, 1, depth=8), tensors_of(base)
    # Small branches: the input of every layer is then nearly the embedding.
    for name in tensors:
        if name.split(".")[-2] in ("o", "down"):
            tensors[name] *= 1e-4
    grown = grow(tensors, base, target, GrowthOptions(operator="clone"), seeded())
    if residual == "the base's":
        target = target.model_copy(update={"base_depth": target.depth})
    none = {n: t * (0 if n.split(".")[-2] in ("o", "down") else 1) for n, t in tensors.items()}
    added = logits(base, tensors) - logits(base, none)
    gap = (logits(target, grown) - logits(base, tensors)).abs().max() / added.abs().max()
    assert (gap < 0.05) == (residual == "the target's")


@settings(max_examples=75)
@given(
    st.sampled_from([*PADDING, *COPYING]),
    st.sampled_from(OPERATORS),
    bases(),
    st.sampled_from([2, 3]),
)
def test_width_and_depth_compose_as_depth_first(operator, depth_operator, base, ratio):
    deep = wider(base, 1, depth=2 * base.depth)
    target, tensors = wider(deep, ratio), tensors_of(base)
    options = GrowthOptions(operator=operator, depth_operator=depth_operator, noise=0.0)
    exact = GrowthOptions(operator="clone", depth_operator=depth_operator)
    deepened = grow(tensors, base, deep, exact, seeded())
    at_once = grow(tensors, base, target, options, seeded())
    in_turn = grow(deepened, deep, target, options, seeded())
    assert {name: tensor.shape for name, tensor in at_once.items()} == parameter_shapes(target)
    assert all(torch.equal(at_once[name], in_turn[name]) for name in at_once)


def gradients_of(spec, tensors):
    model = model_of(spec, tensors)
    loss_nats(model, TOKENS).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("operator", COPYING)
@given(base=bases(), ratio=st.sampled_from([1, 2, 3]), added=st.integers(0, 2))
def test_transferred_moments_are_scaled_as_gradients_are(operator, base, ratio, added):
    target, tensors = wider(base, ratio, depth=base.depth + added), tensors_of(base)
    options = GrowthOptions(
        operator=operator, depth_operator="identity", optimizer_state="transfer"
    )
    grown = gradients_of(target, grow(tensors, base, target, options, seeded(1)))
    state = {f"{n}.exp_avg": g for n, g in gradients_of(base, tensors).items()}
    state |= {f"{n}.exp_avg_sq": g**2 for n, g in gradients_of(base, tensors).items()}
    layers = plan_layers(base.depth, target.depth, "identity")
    for entry, moment in grow_optimizer(state, base, target, options, seeded(1)).items():
        name, key = entry.rsplit(".", 1)
        is_block = name.startswith("blocks")
        if is_block and layers[int(name.split(".")[1])].is_new:
            assert (moment == 0).all()
        else:
            expected = grown[name] ** (2 if key == "exp_avg_sq" else 1)
            assert relative_gap(moment, expected) < 1e-8


@pytest.mark.parametrize(
    ("depth_operator", "rule", "is_kept"),
    [
        ("stack", "transfer", True),
        ("stack", "transfer_old_reset_new", False),
        ("interleave", "transfer", True),
        ("interleave", "transfer_old_reset_new", False),
        ("identity", "transfer", False),
        ("identity", "transfer_old_reset_new", False),
    ],
)
def test_new_layers_start_afresh_where_they_have_no_past_or_are_to_be_reset(
    depth_operator, rule, is_kept
):
    base = ModelSpec(width=8, depth=2, head_dim=4, vocab_size=7)
    options = GrowthOptions(operator="clone", depth_operator=depth_operator, optimizer_state=rule)
    state = grow_optimizer(moments_of(base), base, wider(base, 2, depth=4), options)
    for place, layer in enumerate(plan_layers(2, 4, depth_operator)):
        kept = not layer.is_new or is_kept
        entry = f"blocks.{place}.attention.q.weight"
        assert state[f"{entry}.step"] == (7 if kept else 0)
        assert state[f"{entry}.exp_avg"].any() == kept
        assert state[f"{entry}.exp_avg_sq"].any() == kept


@pytest.fixture(scope="module")
def slopes_of(corpus):
    def measure(parametrization, num_seeds):
        model = ModelSpec(
            width=64, depth=4, head_dim=16, base_depth=4, parametrization=parametrization
        )
        setup = CheckSetup(
            tokens=corpus.train,
            train=TrainSpec(lr=4e-3, batch_size=8),
            context=32,
            num_steps=3,
            num_seeds=num_seeds,
        )
        return check_axis(setup, model, "depth", (4, 8, 16, 32)).last_slopes

    return measure


def test_under_completep_activations_do_not_depend_on_depth(slopes_of):
    measured = slopes_of("mup", num_seeds=4)
    assert all(abs(slope) < FLAT for slope in measured.values()), measured


def test_under_standard_parametrization_the_residual_stream_grows_with_depth(slopes_of):
    measured = slopes_of("standard", num_seeds=2)
    assert measured["stream"] > 4 * FLAT, measured
