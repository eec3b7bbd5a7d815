"""The laws of METHOD §3 for training after growth, and for the optimizer's state; float64."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from warmcore.growth import Growth
from warmcore.model import Decoder, init_, loss_nats
from warmcore.optim import (
    build_optimizer,
    clip_,
    load_optimizer_tensors,
    optimizer_tensors,
    vector_weight,
)
from warmcore.spec import GrowthOptions, ModelSpec, TrainSpec
from warmcore.units import Copies, axes_of, unit_map

from .families import (
    CONTEXT,
    COPYING,
    PADDING,
    TOKENS,
    families,
    grow,
    grow_optimizer,
    model_of,
    moments_of,
    seeded,
    tensors_of,
    unequal_families,
    wider,
)

CLONE = GrowthOptions(operator="clone")

# Law 2


TRAIN = TrainSpec(lr=4e-3, weight_decay=0.1, grad_clip=0.5, eps=1e-5)
SIDE_BY_SIDE_STEPS = 200


def train_step(model, optimizer, weight, window):
    optimizer.zero_grad()
    loss = loss_nats(model, window)
    loss.backward()
    norm = clip_(optimizer, weight, TRAIN.grad_clip).item()
    optimizer.step()
    return loss.item(), norm


def largest_gap(
    base,
    ratio,
    *,
    operator="clone",
    optimizer_state="transfer",
    clip="width_weighted",
    stock=False,
    noise=0.0,
):
    """Largest difference of losses over 200 batches that a base and its copy are trained on."""
    generator = seeded(3)
    windows = torch.randint(
        base.vocab_size, (SIDE_BY_SIDE_STEPS, 4, CONTEXT + 1), generator=generator
    )
    model = init_(Decoder(base, context=CONTEXT), base, generator).double()
    optimizer = build_optimizer(model.named_parameters(), base, TRAIN)
    for window in windows[:10]:
        train_step(model, optimizer, 1.0, window)
    target = wider(base, ratio)
    options = GrowthOptions(operator=operator, optimizer_state=optimizer_state, noise=noise)
    plan = Growth.plan(base, target, options, generator)
    clone = model_of(target, dict(plan.weights(model.state_dict(), generator)))
    clone_optimizer = build_optimizer(clone.named_parameters(), target, TRAIN)
    moments = dict(plan.moments(optimizer_tensors(optimizer)))
    load_optimizer_tensors(clone_optimizer, moments)
    if stock:
        for group in clone_optimizer.param_groups:
            group["eps"] = TRAIN.eps
            group["weight_decay"] = TRAIN.weight_decay if group["weight_decay"] else 0.0
    gap, clipped = 0.0, 0
    for window in windows:
        loss, norm = train_step(model, optimizer, vector_weight("width_weighted", base), window)
        other, _ = train_step(clone, clone_optimizer, vector_weight(clip, target), window)
        gap, clipped = max(gap, abs(loss - other)), clipped + (norm > TRAIN.grad_clip)
    assert clipped > 20  # or else clipping is not under test
    return gap


MHA = ModelSpec(
    width=16, depth=2, head_dim=4, vocab_size=13, base_width=16, unembedding_std=0.3, init_std=0.3
)
GQA = MHA.model_copy(update={"group_size": 2})


@pytest.mark.parametrize("base", [MHA, GQA], ids=["mha", "gqa"])
@pytest.mark.parametrize(
    ("operator", "ratio"), [("clone", 2), ("clone", 3), ("hyperclone", 2), ("net2net", 3)]
)
def test_a_copy_with_its_optimizer_trains_exactly_as_its_base(base, operator, ratio):
    assert largest_gap(base, ratio, operator=operator) < 1e-9


@pytest.mark.parametrize(
    "change",
    [
        {"stock": True},
        {"optimizer_state": "reset"},
        {"optimizer_state": "transfer_old_reset_new"},
        {"clip": "plain"},
        {"operator": "hyperclone", "noise": 0.3},
    ],
    ids=["stock eps and decay", "reset", "old only", "plain clipping", "cancelling noise"],
)
def test_a_clone_with_any_other_rule_does_not(change):
    assert largest_gap(GQA, 2, **change) > 1e-4


def test_repeating_query_heads_one_by_one_does_not(monkeypatch):
    grouped = Copies.along

    def one_by_one(self, name):
        maps = grouped(self, name)
        for dim, axis in enumerate(axes_of(name)):
            if axis == "query":
                num_heads = len(maps[dim].source) // GQA.head_dim
                heads = unit_map("clone", GQA.num_heads, num_heads, seeded())
                maps[dim] = heads.in_features(GQA.head_dim)
        return maps

    monkeypatch.setattr(Copies, "along", one_by_one)
    assert largest_gap(GQA, 2) > 1e-4


# Law 3


@given(families(ratios=st.sampled_from([2, 3, 4])), st.integers(0, 99))
def test_a_clones_width_weighted_gradient_norm_is_its_bases(family, seed):
    base, target = family
    base, target = (s.model_copy(update={"parametrization": "mup"}) for s in (base, target))
    tensors = tensors_of(base, seed)
    norms = []
    for spec, weights in ((base, tensors), (target, grow(tensors, base, target, CLONE, seeded()))):
        model = model_of(spec, weights)
        loss_nats(model, TOKENS).backward()
        optimizer = build_optimizer(model.named_parameters(), spec, TRAIN)
        norms.append([clip_(optimizer, w, None).item() for w in (spec.width_multiplier, 1.0)])
    assert norms[1][0] == pytest.approx(norms[0][0], rel=1e-9)
    assert not math.isclose(norms[1][1], norms[0][0], rel_tol=1e-6)


# The optimizer's state


def test_reset_forgets_the_optimizer():
    base = ModelSpec(width=8, depth=1, head_dim=4, vocab_size=7)
    assert grow_optimizer(moments_of(base), base, wider(base, 2), CLONE) == {}


@pytest.mark.parametrize("operator", COPYING)
@given(family=families(ratios=st.just(1)))
def test_an_optimizer_transferred_to_the_same_size_is_unchanged(operator, family):
    base, target = family
    state = moments_of(base)
    for rule in ("transfer", "transfer_old_reset_new"):
        options = GrowthOptions(operator=operator, optimizer_state=rule)
        grown = grow_optimizer(state, base, target, options)
        assert grown.keys() == state.keys()
        assert all(torch.equal(grown[name], state[name]) for name in state)


@pytest.mark.parametrize("operator", COPYING)
@given(family=families(ratios=st.sampled_from([2, 3])))
def test_old_reset_new_keeps_each_units_first_copy_and_nothing_else(operator, family):
    base, target = family
    ratio = target.width // base.width
    state = moments_of(base)
    whole, old = (
        grow_optimizer(state, base, target, GrowthOptions(operator=operator, optimizer_state=rule))
        for rule in ("transfer", "transfer_old_reset_new")
    )
    for entry, tensor in old.items():
        if entry.endswith(".step"):
            assert tensor == 7
            continue
        kept = tensor != 0
        assert torch.equal(tensor[kept], whole[entry][kept])
        assert kept.sum() == state[entry].numel()
        assert ratio > 1
        assert kept.sum() < kept.numel()


@pytest.mark.parametrize("operator", PADDING)
@given(family=unequal_families())
def test_padding_with_old_reset_new_keeps_the_bases_moments_at_mups_scale(operator, family):
    base, target = family
    state = moments_of(base)
    options = GrowthOptions(operator=operator, optimizer_state="transfer_old_reset_new")
    for entry, grown in grow_optimizer(state, base, target, options).items():
        old = tuple(slice(size) for size in state[entry].shape)
        power = {"step": 0, "exp_avg": 1, "exp_avg_sq": 2}[entry.rsplit(".", 1)[1]]
        is_flat = entry.startswith("unembedding") and target.parametrization == "standard"
        scale = 1.0 if is_flat else base.width / target.width
        assert torch.allclose(grown[old], state[entry] * scale**power, rtol=1e-12)
        assert grown.count_nonzero() == state[entry].count_nonzero()
