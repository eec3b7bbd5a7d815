"""The laws of METHOD §3 for training after growth, and for the optimizer's state; float64."""

import math

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tests.warmcore.growth.families import (
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
from warmcore.growth.growth import Growth
from warmcore.growth.units import Copies, axis_kinds, make_unit_map
from warmcore.model.decoder import Decoder, init_weights_, loss_nats
from warmcore.specs import GrowthOptions, ModelSpec, TrainSpec
from warmcore.training.optimizer import (
    build_optimizer,
    clip_gradients_,
    load_optimizer_tensors,
    optimizer_tensors,
    vector_norm_weight,
)

CLONE = GrowthOptions(operator="clone")

# Law 2: a copy with its optimizer state trains exactly like its base.


ADAMW = TrainSpec(lr=4e-3, weight_decay=0.1, grad_clip=0.1, eps=1e-5)
MUON = ADAMW.model_copy(update={"optimizer": "muon", "muon_lr_ratio": 2.0})
SIDE_BY_SIDE_STEPS = 200


def in_the_gradients_precision(gradient, coefficients, num_steps, eps):
    """Compute the library's Newton-Schulz steps in the gradient's precision."""
    # The library computes them in bfloat16. Equality up to 1e-9 could not be tested there.
    a, b, c = coefficients
    x = gradient.T if len(gradient) > len(gradient.T) else gradient
    x = x / x.norm().clamp(min=eps)
    for _ in range(num_steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if len(gradient) > len(gradient.T) else x


@pytest.fixture(autouse=True, scope="module")
def exact_newton_schulz():
    with pytest.MonkeyPatch.context() as patch:
        name = "torch.optim._muon._zeropower_via_newtonschulz"
        patch.setattr(name, in_the_gradients_precision)
        yield


def train_step(model, optimizer, weight, window):
    optimizer.zero_grad()
    loss = loss_nats(model, window)
    loss.backward()
    norm = clip_gradients_(optimizer, weight, ADAMW.grad_clip).item()
    optimizer.step()
    return loss.item(), norm


def gaps(
    base,
    target,
    *,
    train=ADAMW,
    operator="clone",
    optimizer_state="transfer",
    clip="width_weighted",
    stock=False,
    noise=0.0,
    seed=3,
):
    """Yield the differences of the losses of a base and its copy over 200 training batches."""
    generator = seeded(seed)
    windows = torch.randint(
        base.vocab_size, (SIDE_BY_SIDE_STEPS, 4, CONTEXT + 1), generator=generator
    )
    model = init_weights_(Decoder(base, context=CONTEXT), base, generator).double()
    optimizer = build_optimizer(model.named_parameters(), base, train)
    weight = vector_norm_weight("width_weighted", base)
    for window in windows[:10]:
        train_step(model, optimizer, weight, window)
    options = GrowthOptions(
        operator=operator, depth_operator="identity", optimizer_state=optimizer_state, noise=noise
    )
    plan = Growth.plan(base, target, options, generator)
    clone = model_of(target, dict(plan.grow_weights(model.state_dict(), generator)))
    clone_optimizer = build_optimizer(clone.named_parameters(), target, train)
    load_optimizer_tensors(clone_optimizer, dict(plan.grow_moments(optimizer_tensors(optimizer))))
    if stock:
        as_at_the_base(clone_optimizer, optimizer)
    clipped = 0
    for window in windows:
        loss, norm = train_step(model, optimizer, weight, window)
        other, _ = train_step(clone, clone_optimizer, vector_norm_weight(clip, target), window)
        yield abs(loss - other)
        clipped += norm > train.grad_clip
    # Without clipped steps the test would say nothing about clipping.
    assert clipped > 20


def as_at_the_base(clone_optimizer, optimizer):
    """Remove the factors that depend on width: set the base's eps, decay and Muon's lr."""
    of_base = {group["role"]: group for group in optimizer.param_groups}
    for group in clone_optimizer.param_groups:
        same = of_base[group["role"]]
        group |= {"eps": same["eps"], "weight_decay": same["weight_decay"]}
        if "momentum" in group:
            group["lr"] = same["lr"]


def trained(**fields):
    shape = {"width": 16, "depth": 2, "head_dim": 4, "ffn_ratio": 2.0}
    return ModelSpec(**(shape | fields), vocab_size=13, unembedding_std=0.3, init_std=0.3)


@st.composite
def trained_families(draw, ratios=(2, 3, 4), group_sizes=(1, 2, 3)):
    """Draw small bases of several widths, depths and groups; base_width is the width or half."""
    group_size = draw(st.sampled_from(group_sizes))
    head_dim = draw(st.sampled_from([2, 4]))
    half = head_dim * group_size * draw(st.integers(1, 2))
    base = trained(
        width=2 * half,
        head_dim=head_dim,
        group_size=group_size,
        depth=draw(st.integers(1, 2)),
        ffn_ratio=draw(st.sampled_from([2.0, 3.0])),
        base_width=draw(st.sampled_from([half, 2 * half])),
    )
    return base, wider(base, draw(st.sampled_from(ratios)))


few = settings(max_examples=3, phases=[Phase.generate])  # an example trains for a second


@pytest.mark.parametrize("train", [ADAMW, MUON], ids=["adamw", "muon"])
@few
@given(trained_families(), st.sampled_from(COPYING), st.integers(0, 99))
def test_a_copy_with_its_optimizer_trains_exactly_as_its_base(train, family, operator, seed):
    assert max(gaps(*family, train=train, operator=operator, seed=seed)) < 1e-9


GQA = trained(group_size=2, base_width=16)


@pytest.mark.parametrize(
    "change",
    [
        {"stock": True},
        {"optimizer_state": "reset"},
        {"optimizer_state": "transfer_old_reset_new"},
        {"clip": "plain"},
        {"operator": "hyperclone", "noise": 0.3},
        {"train": MUON, "stock": True},
        {"train": MUON, "optimizer_state": "reset"},
        {"train": MUON, "operator": "hyperclone", "noise": 0.3},
    ],
    ids=[
        "stock eps and decay",
        "reset",
        "old only",
        "plain clipping",
        "cancelling noise",
        "muon, stock lr",
        "muon, reset",
        "muon, cancelling noise",
    ],
)
@few
@given(trained_families())
def test_a_clone_with_any_other_rule_does_not(change, family):
    assert any(gap > 1e-4 for gap in gaps(*family, **change))


@few
@given(trained_families(group_sizes=(2, 3)))
def test_repeating_query_heads_one_by_one_does_not(family):
    base, target = family
    grouped = Copies.maps_along_axes

    def one_by_one(self, name):
        maps = grouped(self, name)
        for dim, axis in enumerate(axis_kinds(name)):
            if axis == "query":
                num_heads = len(maps[dim].source) // base.head_dim
                heads = make_unit_map("clone", base.num_heads, num_heads, seeded())
                maps[dim] = heads.expand_to_features(base.head_dim)
        return maps

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Copies, "maps_along_axes", one_by_one)
        found = gaps(base, target)
        assert next(found) < 1e-9  # the function is kept, training is not
        assert any(gap > 1e-4 for gap in found)


def test_identity_layers_start_with_the_bases_loss_and_then_learn_something_of_their_own():
    """Law 2 does not hold for depth: new output projections are zero, and get gradients."""
    found = gaps(GQA, wider(GQA, 2, depth=3))
    assert next(found) < 1e-9
    assert any(gap > 1e-4 for gap in found)


# Law 3: the width-weighted gradient norm of a copy equals that of its base.


@given(families(ratios=st.sampled_from([2, 3, 4])), st.sampled_from(COPYING), st.integers(0, 99))
def test_a_copys_width_weighted_gradient_norm_is_its_bases(family, operator, seed):
    base, target = family
    base, target = (s.model_copy(update={"parametrization": "mup"}) for s in (base, target))
    tensors = tensors_of(base, seed)
    norms = []
    grown = grow(tensors, base, target, GrowthOptions(operator=operator), seeded(seed))
    for spec, weights in ((base, tensors), (target, grown)):
        model = model_of(spec, weights)
        loss_nats(model, TOKENS).backward()
        optimizer = build_optimizer(model.named_parameters(), spec, ADAMW)
        norms.append(
            [clip_gradients_(optimizer, w, None).item() for w in (spec.width_multiplier, 1.0)]
        )
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
