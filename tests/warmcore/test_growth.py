"""The laws of METHOD §3. Exact ones have no tolerance; the others are in float64."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from warmcore import growth as growth_module
from warmcore.growth import grow, grow_optimizer
from warmcore.model import Decoder, init_, loss_nats, parameter_shapes
from warmcore.mup import role_of
from warmcore.optim import (
    build_optimizer,
    clip_,
    load_optimizer_tensors,
    optimizer_tensors,
    vector_weight,
)
from warmcore.spec import GrowthOptions, ModelSpec, TrainSpec

CLONE = GrowthOptions(operator="clone")
CONTEXT = 12


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def tensors_of(spec, seed=0):
    """Random in every element, gains included."""
    generator = seeded(seed)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in parameter_shapes(spec).items()
    }


def model_of(spec, tensors):
    model = Decoder(spec, context=CONTEXT).double()
    model.load_state_dict(tensors)
    return model


def wider(spec, ratio):
    width = spec.width * ratio
    assert width == int(width)
    return spec.model_copy(
        update={"width": int(width), "base_width": spec.base_width or spec.width}
    )


any_ratio = st.sampled_from([1, 2, 3, 4])


@st.composite
def families(draw, ratios=any_ratio):
    """A base and a wider target of one family."""
    head_dim = draw(st.sampled_from([2, 4]))
    group_size = draw(st.sampled_from([1, 2]))
    block = head_dim * group_size
    width = block * draw(st.integers(1, 3))
    base = ModelSpec(
        width=width,
        depth=draw(st.integers(1, 3)),
        head_dim=head_dim,
        group_size=group_size,
        ffn_ratio=draw(st.sampled_from([2.0, 3.0])),
        vocab_size=7,
        base_width=draw(st.sampled_from([None, block])),
        parametrization=draw(st.sampled_from(["mup", "standard"])),
        unembedding_std=draw(st.sampled_from([0.0, 0.2])),
    )
    return base, wider(base, draw(ratios))


logits_tokens = torch.arange(2 * CONTEXT).view(2, CONTEXT) % 7


def relative_gap(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


# Law 1


@given(families(ratios=st.sampled_from([2, 3, 4])))
def test_a_clone_computes_its_bases_function(family):
    base, target = family
    tensors = tensors_of(base)
    expected = model_of(base, tensors)(logits_tokens)
    grown = grow(tensors, base, target, CLONE, seeded())
    assert relative_gap(model_of(target, grown)(logits_tokens), expected) < 1e-9


@given(families(ratios=st.sampled_from([2, 3])), st.data())
def test_a_clone_with_any_other_scale_does_not(family, data):
    base, target = family
    tensors = tensors_of(base)
    expected = model_of(base, tensors)(logits_tokens)
    grown = grow(tensors, base, target, CLONE, seeded())
    names = [n for n in grown if n.split(".")[-2] in ("v", "o", "up", "down", "unembedding")]
    name = data.draw(st.sampled_from(names))
    grown[name] = grown[name] * 2
    assert relative_gap(model_of(target, grown)(logits_tokens), expected) > 1e-4


def test_a_padded_model_does_not_compute_its_bases_function():
    base = ModelSpec(width=8, depth=2, head_dim=4, vocab_size=7)
    target, tensors = wider(base, 2), tensors_of(base)
    grown = grow(tensors, base, target, GrowthOptions(operator="zero_pad"), seeded())
    expected = model_of(base, tensors)(logits_tokens)
    assert relative_gap(model_of(target, grown)(logits_tokens), expected) > 1e-2


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


def largest_gap(base, ratio, *, optimizer_state="transfer", clip="width_weighted", stock=False):
    """Largest difference of losses over 200 batches that a base and its clone are trained on."""
    generator = seeded(3)
    windows = torch.randint(
        base.vocab_size, (SIDE_BY_SIDE_STEPS, 4, CONTEXT + 1), generator=generator
    )
    model = init_(Decoder(base, context=CONTEXT), base, generator).double()
    optimizer = build_optimizer(model.named_parameters(), base, TRAIN)
    for window in windows[:10]:
        train_step(model, optimizer, 1.0, window)
    target = wider(base, ratio)
    options = GrowthOptions(operator="clone", optimizer_state=optimizer_state)
    clone = model_of(target, grow(model.state_dict(), base, target, options, generator))
    clone_optimizer = build_optimizer(clone.named_parameters(), target, TRAIN)
    moments = grow_optimizer(optimizer_tensors(optimizer), base, target, options)
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


@pytest.mark.parametrize("ratio", [2, 3])
@pytest.mark.parametrize("base", [MHA, GQA], ids=["mha", "gqa"])
def test_a_clone_with_its_optimizer_trains_exactly_as_its_base(base, ratio):
    assert largest_gap(base, ratio) < 1e-9


@pytest.mark.parametrize(
    "change",
    [
        {"stock": True},
        {"optimizer_state": "reset"},
        {"optimizer_state": "transfer_old_reset_new"},
        {"clip": "plain"},
    ],
    ids=["stock eps and decay", "reset", "old only", "plain clipping"],
)
def test_a_clone_with_any_other_rule_does_not(change):
    assert largest_gap(GQA, 2, **change) > 1e-4


def test_repeating_query_heads_one_by_one_does_not(monkeypatch):
    monkeypatch.setattr(
        growth_module,
        "unit_size",
        lambda axis, model: model.head_dim if axis in ("query", "key_value") else 1,
    )
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
        loss_nats(model, logits_tokens).backward()
        optimizer = build_optimizer(model.named_parameters(), spec, TRAIN)
        norms.append([clip_(optimizer, w, None).item() for w in (spec.width_multiplier, 1.0)])
    assert norms[1][0] == pytest.approx(norms[0][0], rel=1e-9)
    assert not math.isclose(norms[1][1], norms[0][0], rel_tol=1e-6)


# Law 4


def base_block(tensor, like):
    return tensor[tuple(slice(size) for size in like.shape)]


@st.composite
def unequal_families(draw):
    """Targets of any width that is whole heads, not only multiples of the base's."""
    base, _ = draw(families())
    block = base.head_dim * base.group_size
    width = base.width + block * draw(st.integers(1, 4))
    return base, base.model_copy(
        update={"width": width, "base_width": base.base_width or base.width}
    )


def rest_of(tensor, like):
    rest = torch.ones_like(tensor, dtype=torch.bool)
    base_block(rest, like).fill_(False)
    return tensor[rest]


PADDING = [
    GrowthOptions(operator="zero_pad"),
    GrowthOptions(operator="shrink_perturb", shrink=1.0, perturb=0.0),
]


@pytest.mark.parametrize("options", PADDING, ids=lambda options: options.operator)
@given(family=unequal_families())
def test_unshrunk_and_unperturbed_the_base_is_untouched_and_the_rest_does_nothing(options, family):
    base, target = family
    tensors = {name: tensor.float() for name, tensor in tensors_of(base).items()}
    for name, grown in grow(tensors, base, target, options, seeded()).items():
        assert torch.equal(base_block(grown, tensors[name]), tensors[name])
        nothing = 1.0 if role_of(name) == "gain" else 0.0
        assert (rest_of(grown, tensors[name]) == nothing).all()


@given(unequal_families(), st.integers(0, 99))
def test_shrunk_to_nothing_and_perturbed_fully_it_is_a_cold_start(family, seed):
    base, target = family
    tensors = {name: tensor.float() for name, tensor in tensors_of(base).items()}
    options = GrowthOptions(operator="shrink_perturb", shrink=0.0, perturb=1.0)
    cold = init_(Decoder(target, context=CONTEXT), target, seeded(seed)).state_dict()
    grown = grow(tensors, base, target, options, seeded(seed))
    assert list(grown) == list(cold)
    assert all(torch.equal(grown[name], cold[name]) for name in cold)


@given(unequal_families(), st.floats(0.1, 1), st.floats(0.1, 2))
def test_shrink_perturb_is_its_formula(family, shrink, perturb):
    base, target = family
    tensors = tensors_of(base)
    options = GrowthOptions(operator="shrink_perturb", shrink=shrink, perturb=perturb)
    fresh = init_(Decoder(target, context=CONTEXT), target, seeded()).double().state_dict()
    for name, grown in grow(tensors, base, target, options, seeded()).items():
        if role_of(name) == "gain":
            expected = torch.ones_like(grown)
            base_block(expected, tensors[name]).add_(shrink * (tensors[name] - 1))
        else:
            expected = perturb * fresh[name]
            base_block(expected, tensors[name]).add_(shrink * tensors[name])
        assert torch.allclose(grown, expected, rtol=1e-12, atol=1e-15)


# Law 5


@pytest.mark.parametrize("operator", ["shrink_perturb", "zero_pad", "clone"])
@given(family=families(ratios=st.just(1)))
def test_growing_to_the_same_size_is_the_identity(operator, family):
    base, target = family
    tensors = tensors_of(base)
    options = GrowthOptions(operator=operator, shrink=1.0, perturb=0.0)
    for name, grown in grow(tensors, base, target, options, seeded()).items():
        assert torch.equal(grown, tensors[name])


# Options and plumbing


@given(families(ratios=st.sampled_from([2, 3])))
def test_clone_noise_is_of_the_targets_initial_size_and_spares_gains(family):
    base, target = family
    tensors = tensors_of(base)
    exact = grow(tensors, base, target, CLONE, seeded())
    noisy_options = CLONE.model_copy(update={"noise": 0.25})
    noisy = grow(tensors, base, target, noisy_options, seeded(5))
    fresh = init_(Decoder(target, context=CONTEXT), target, seeded(6)).state_dict()
    for name in exact:
        noise = noisy[name] - exact[name]
        if role_of(name) == "gain" or fresh[name].std() == 0:
            assert (noise == 0).all()
        elif noise.numel() > 100:
            assert noise.std().item() == pytest.approx(0.25 * fresh[name].std().item(), rel=0.35)


def test_a_clone_without_noise_draws_nothing():
    base = ModelSpec(width=8, depth=1, head_dim=4, vocab_size=7)
    generator = seeded()
    before = generator.get_state()
    grow(tensors_of(base), base, wider(base, 2), CLONE, generator)
    assert torch.equal(before, generator.get_state())


@pytest.mark.parametrize("operator", ["shrink_perturb", "zero_pad", "clone"])
def test_tensors_are_grown_one_at_a_time(operator):
    base = ModelSpec(width=8, depth=2, head_dim=4, vocab_size=7)
    read = []

    class Lazy(dict):
        def __getitem__(self, name):
            read.append(name)
            return super().__getitem__(name)

    options = GrowthOptions(operator=operator)
    grown = growth_module.iter_grown(
        Lazy(tensors_of(base)), base, wider(base, 2), options, seeded()
    )
    names = [name for name, _ in itertools.islice(grown, 3)]
    assert read == names


def moments_of(base):
    tensors = tensors_of(base)
    state = {f"{name}.exp_avg": t for name, t in tensors.items()}
    state |= {f"{name}.exp_avg_sq": t.square() for name, t in tensors.items()}
    return state | {f"{name}.step": torch.tensor(7.0) for name in tensors}


def test_reset_forgets_the_optimizer():
    base = ModelSpec(width=8, depth=1, head_dim=4, vocab_size=7)
    assert grow_optimizer(moments_of(base), base, wider(base, 2), CLONE) == {}


@given(families(ratios=st.just(1)))
def test_an_optimizer_transferred_to_the_same_size_is_unchanged(family):
    base, target = family
    state = moments_of(base)
    for rule in ("transfer", "transfer_old_reset_new"):
        options = GrowthOptions(operator="clone", optimizer_state=rule)
        grown = grow_optimizer(state, base, target, options)
        assert grown.keys() == state.keys()
        assert all(torch.equal(grown[name], state[name]) for name in state)


@given(families(ratios=st.sampled_from([2, 3])))
def test_old_reset_new_keeps_each_units_first_copy_and_nothing_else(family):
    base, target = family
    ratio = target.width // base.width
    state = moments_of(base)
    whole, old = (
        grow_optimizer(state, base, target, GrowthOptions(operator="clone", optimizer_state=rule))
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


@pytest.mark.parametrize(
    ("options", "target", "message"),
    [
        ({}, {"width": 8}, "target width 8 is smaller than base width 16"),
        ({}, {"depth": 3}, "target depth 3 differs from base depth 2"),
        ({}, {"group_size": 2}, "group_size must be the same in base and target: 1 is not 2"),
        ({}, {"base_width": None}, "base_width must be the same in base and target: 16 is not 24"),
        (
            {"operator": "clone"},
            {},
            "cannot clone width 16 into 24: ratio 1.5 is not an integer; 16 or 32 work",
        ),
        ({"optimizer_state": "transfer"}, {}, "optimizer_state transfer needs operator clone"),
    ],
)
def test_what_cannot_be_grown_is_refused_with_its_numbers(options, target, message):
    base = ModelSpec(width=16, depth=2, head_dim=4)
    wide = ModelSpec(**({"width": 24, "depth": 2, "head_dim": 4, "base_width": 16} | target))
    with pytest.raises(ValueError) as caught:
        grow(tensors_of(base), base, wide, GrowthOptions(**options), seeded())
    assert message in str(caught.value)
