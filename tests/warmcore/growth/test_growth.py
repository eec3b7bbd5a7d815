"""The laws of METHOD §3 for weights: exact laws without tolerance, the others in float64."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.warmcore.growth.families import (
    CONTEXT,
    COPYING,
    PADDING,
    families,
    grow,
    logits,
    relative_gap,
    seeded,
    tensors_of,
    unequal_families,
    wider,
)
from warmcore.growth import growth as growth_module
from warmcore.growth.growth import Growth
from warmcore.model.decoder import Decoder, init_weights_
from warmcore.model.mup import GAINS, role_of
from warmcore.specs import GrowthOptions, ModelSpec, growth_rules

CLONE = GrowthOptions(operator="clone")
several = st.sampled_from([2, 3, 4])


# Law 1: copying operators keep the function.


@pytest.mark.parametrize(
    ("operator", "noise"),
    [*((operator, 0.0) for operator in COPYING), ("hyperclone", 0.5), ("net2net", 0.5)],
)
@given(family=families(ratios=several, added_layers=st.integers(0, 2)), seed=st.integers(0, 99))
def test_a_copying_operator_keeps_the_function_also_with_identity_layers(
    operator, noise, family, seed
):
    base, target = family
    tensors = tensors_of(base)
    options = GrowthOptions(operator=operator, depth_operator="identity", noise=noise)
    grown = grow(tensors, base, target, options, seeded(seed))
    assert relative_gap(logits(target, grown), logits(base, tensors)) < 1e-9


@pytest.mark.parametrize("operator", COPYING)
@given(family=families(ratios=st.sampled_from([2, 3])), data=st.data())
def test_any_other_scale_does_not(operator, family, data):
    base, target = family
    tensors = tensors_of(base)
    grown = grow(tensors, base, target, GrowthOptions(operator=operator), seeded())
    names = [n for n in grown if n.split(".")[-2] in ("v", "o", "up", "down", "unembedding")]
    name = data.draw(st.sampled_from(names))
    grown[name] = grown[name] * 2
    assert relative_gap(logits(target, grown), logits(base, tensors)) > 1e-4


@pytest.mark.parametrize("operator", ["hyperclone", "net2net"])
@given(family=families(ratios=several))
def test_noise_that_does_not_cancel_does_not(operator, family):
    base, target = family
    target = target.model_copy(update={"unembedding_std": 0.2})
    tensors = tensors_of(base)
    options = GrowthOptions(operator=operator, noise=0.5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(growth_module, "cancel_over_copies_", lambda noise, inputs: noise)
        grown = grow(tensors, base, target, options, seeded())
    assert relative_gap(logits(target, grown), logits(base, tensors)) > 1e-4


@pytest.mark.parametrize("operator", PADDING)
def test_a_padded_model_does_not_compute_its_bases_function(operator):
    base = ModelSpec(width=8, depth=2, head_dim=4, vocab_size=7)
    target, tensors = wider(base, 2), tensors_of(base)
    options = GrowthOptions(operator=operator, shrink=1.0, perturb=0.0)
    grown = grow(tensors, base, target, options, seeded())
    assert relative_gap(logits(target, grown), logits(base, tensors)) > 1e-2


def test_net2net_at_other_ratios_is_not_exact_and_says_so():
    base = ModelSpec(width=32, depth=2, head_dim=4, group_size=2, vocab_size=7)
    target, tensors = wider(base, 1.5), tensors_of(base)
    options = GrowthOptions(operator="net2net")
    grown = grow(tensors, base, target, options, seeded())
    assert relative_gap(logits(target, grown), logits(base, tensors)) > 1e-6
    (warning,) = growth_rules.find_warnings(options, base, target)
    assert "only approximates the base at width ratio 1.5" in warning
    assert "width 32 or 64 it is exact" in warning
    assert not list(growth_rules.find_warnings(options, base, wider(base, 2)))


@pytest.mark.parametrize("name", ["embedding", "attention"])
def test_another_multiplier_changes_the_function_and_says_so(name):
    base = ModelSpec(width=8, depth=2, head_dim=4, vocab_size=7)
    target, tensors = wider(base, 2), tensors_of(base)
    target = target.model_copy(update={f"{name}_multiplier": 2.0})
    options = GrowthOptions(operator="clone")
    grown = grow(tensors, base, target, options, seeded())
    assert relative_gap(logits(target, grown), logits(base, tensors)) > 1e-6
    (warning,) = growth_rules.find_warnings(options, base, target)
    assert f"{name}_multiplier 2 in place of the base's 1 changes the function" in warning


def test_another_output_multiplier_is_made_up_for():
    base = ModelSpec(width=8, depth=2, head_dim=4, vocab_size=7)
    target = wider(base, 2).model_copy(update={"output_multiplier": 3.0})
    tensors, options = tensors_of(base), GrowthOptions(operator="clone")
    grown = grow(tensors, base, target, options, seeded())
    assert relative_gap(logits(target, grown), logits(base, tensors)) < 1e-9
    assert not list(growth_rules.find_warnings(options, base, target))


@given(families(ratios=several), st.integers(0, 99))
def test_net2net_is_a_balanced_map_that_keeps_the_base_first(family, seed):
    base, target = family
    plan = Growth.plan(base, target, GrowthOptions(operator="net2net"), seeded(seed))
    for name in plan.shapes:
        for unit_map in plan.copies.maps_along_axes(name):
            if unit_map is not None:
                num_base = len(unit_map.source) * base.width // target.width
                assert torch.equal(unit_map.source[:num_base], torch.arange(num_base))
                assert (unit_map.num_copies == target.width // base.width).all()


# Law 4: padding keeps the base's values, and its new units do nothing.


def base_block(tensor, like):
    return tensor[tuple(slice(size) for size in like.shape)]


def rest_of(tensor, like):
    rest = torch.ones_like(tensor, dtype=torch.bool)
    base_block(rest, like).fill_(False)
    return tensor[rest]


@pytest.mark.parametrize("operator", PADDING)
@given(family=unequal_families())
def test_unshrunk_and_unperturbed_the_base_is_untouched_and_the_rest_does_nothing(operator, family):
    base, target = family
    options = GrowthOptions(operator=operator, shrink=1.0, perturb=0.0)
    tensors = {name: tensor.float() for name, tensor in tensors_of(base).items()}
    for name, grown in grow(tensors, base, target, options, seeded()).items():
        assert torch.equal(base_block(grown, tensors[name]), tensors[name])
        nothing = 1.0 if role_of(name) in GAINS else 0.0
        assert (rest_of(grown, tensors[name]) == nothing).all()


@pytest.mark.parametrize("change", [{"shrink": 0.9}, {"perturb": 0.1}], ids=["shrunk", "perturbed"])
@given(family=unequal_families())
def test_shrunk_or_perturbed_a_little_the_base_is_touched(change, family):
    base, target = family
    options = GrowthOptions(**({"shrink": 1.0, "perturb": 0.0} | change))
    tensors = tensors_of(base)
    for name, grown in grow(tensors, base, target, options, seeded()).items():
        drawn = role_of(name) not in GAINS and (
            role_of(name) != "unembedding" or target.unembedding_std
        )
        if "shrink" in change or drawn:
            assert not torch.equal(base_block(grown, tensors[name]), tensors[name])
        nothing = 1.0 if role_of(name) in GAINS else 0.0
        untouched = (rest_of(grown, tensors[name]) == nothing).all()
        assert untouched == ("shrink" in change or not drawn)


@given(
    unequal_families(added_layers=st.integers(0, 2)),
    st.integers(0, 99),
)
def test_shrunk_to_nothing_and_perturbed_fully_it_is_a_cold_start(family, seed):
    base, target = family
    tensors = {name: tensor.float() for name, tensor in tensors_of(base).items()}
    options = GrowthOptions(depth_operator="identity", shrink=0.0, perturb=1.0)
    cold = init_weights_(Decoder(target, context=CONTEXT), target, seeded(seed)).state_dict()
    grown = grow(tensors, base, target, options, seeded(seed))
    assert list(grown) == list(cold)
    assert all(torch.equal(grown[name], cold[name]) for name in cold)


@pytest.mark.parametrize(
    "change", [{"seed": 100}, {"perturb": 0.9}, {"shrink": 0.1}], ids=["seed", "perturb", "shrink"]
)
@given(family=unequal_families(added_layers=st.integers(0, 2)), seed=st.integers(0, 99))
def test_with_another_seed_shrink_or_perturb_it_is_not_that_cold_start(change, family, seed):
    base, target = family
    tensors = {name: tensor.float() for name, tensor in tensors_of(base).items()}
    scales = {"shrink": 0.0, "perturb": 1.0} | {k: v for k, v in change.items() if k != "seed"}
    options = GrowthOptions(depth_operator="identity", **scales)
    cold = init_weights_(Decoder(target, context=CONTEXT), target, seeded(seed)).state_dict()
    grown = grow(tensors, base, target, options, seeded(change.get("seed", seed)))
    # Without the tensors that are zero in new identity layers, whatever the scale.
    drawn = [name for name in cold if name.split(".")[-2] in ("embedding", "q", "v", "up")]
    assert not any(torch.equal(grown[name], cold[name]) for name in drawn)


@given(unequal_families(), st.floats(0.1, 1), st.floats(0.1, 2))
def test_shrink_perturb_is_its_formula(family, shrink, perturb):
    base, target = family
    tensors = tensors_of(base)
    options = GrowthOptions(operator="shrink_perturb", shrink=shrink, perturb=perturb)
    fresh = init_weights_(Decoder(target, context=CONTEXT), target, seeded()).double().state_dict()
    for name, grown in grow(tensors, base, target, options, seeded()).items():
        if role_of(name) in GAINS:
            expected = torch.ones_like(grown)
            base_block(expected, tensors[name]).add_(shrink * (tensors[name] - 1))
        else:
            expected = perturb * fresh[name]
            base_block(expected, tensors[name]).add_(shrink * tensors[name])
        assert torch.allclose(grown, expected, rtol=1e-12, atol=1e-15)


@given(unequal_families(), st.floats(0.1, 1), st.floats(0.1, 2))
def test_slice_is_shrink_perturb_without_noise_in_the_padding(family, shrink, perturb):
    base, target = family
    tensors = tensors_of(base)
    whole, sliced = (
        grow(
            tensors,
            base,
            target,
            GrowthOptions(operator=o, shrink=shrink, perturb=perturb),
            seeded(),
        )
        for o in ("shrink_perturb", "slice")
    )
    for name, grown in sliced.items():
        assert torch.equal(base_block(grown, tensors[name]), base_block(whole[name], tensors[name]))
        nothing = 1.0 if role_of(name) in GAINS else 0.0
        assert (rest_of(grown, tensors[name]) == nothing).all()


# Law 5: growing to the same size changes nothing.


@settings(max_examples=75)
@given(
    st.sampled_from([*PADDING, *COPYING]),
    st.sampled_from([None, "stack", "interleave", "identity"]),
    families(ratios=st.just(1)),
)
def test_growing_to_the_same_size_is_the_identity(operator, depth_operator, family):
    base, target = family
    tensors = tensors_of(base)
    options = GrowthOptions(
        operator=operator, depth_operator=depth_operator, shrink=1.0, perturb=0.0
    )
    for name, grown in grow(tensors, base, target, options, seeded()).items():
        assert torch.equal(grown, tensors[name])


@pytest.mark.parametrize(
    "change",
    [
        *({"operator": operator, "shrink": 0.9} for operator in ("shrink_perturb", "slice")),
        *({"operator": operator, "perturb": 0.1} for operator in ("shrink_perturb", "slice")),
        {"operator": "clone", "noise": 0.1},
    ],
    ids=lambda change: " ".join(str(value) for value in change.values()),
)
@given(families(ratios=st.just(1)))
def test_with_shrinking_or_noise_it_is_not(change, family):
    base, target = family
    tensors = tensors_of(base)
    options = GrowthOptions(**({"shrink": 1.0, "perturb": 0.0} | change))
    grown = grow(tensors, base, target, options, seeded())
    drawn = [name for name in grown if role_of(name) in ("embedding", "hidden")]
    assert not any(torch.equal(grown[name], tensors[name]) for name in drawn)


# Options and plumbing


@given(families(ratios=st.sampled_from([2, 3])))
def test_clone_noise_is_of_the_targets_initial_size_and_spares_gains(family):
    base, target = family
    tensors = tensors_of(base)
    exact = grow(tensors, base, target, CLONE, seeded())
    noisy_options = CLONE.model_copy(update={"noise": 0.25})
    noisy = grow(tensors, base, target, noisy_options, seeded(5))
    fresh = init_weights_(Decoder(target, context=CONTEXT), target, seeded(6)).state_dict()
    for name in exact:
        noise = noisy[name] - exact[name]
        if role_of(name) in GAINS or fresh[name].std() == 0:
            assert (noise == 0).all()
        elif noise.numel() > 100:
            assert noise.std().item() == pytest.approx(0.25 * fresh[name].std().item(), rel=0.35)


def test_a_clone_without_noise_draws_nothing():
    base = ModelSpec(width=8, depth=1, head_dim=4, vocab_size=7)
    generator = seeded()
    before = generator.get_state()
    grow(tensors_of(base), base, wider(base, 2), CLONE, generator)
    assert torch.equal(before, generator.get_state())


@pytest.mark.parametrize("operator", [*PADDING, *COPYING])
def test_tensors_are_grown_one_at_a_time(operator):
    base = ModelSpec(width=8, depth=2, head_dim=4, vocab_size=7)
    read = []

    class Lazy(dict):
        def __getitem__(self, name):
            read.append(name)
            return super().__getitem__(name)

    plan = Growth.plan(base, wider(base, 2), GrowthOptions(operator=operator), seeded())
    grown = plan.grow_weights(Lazy(tensors_of(base)), seeded())
    names = [name for name, _ in itertools.islice(grown, 3)]
    assert read == names


@pytest.mark.parametrize(
    ("options", "target", "message"),
    [
        ({}, {"width": 8}, "target width 8 is smaller than base width 16"),
        ({}, {"depth": 1}, "target depth 1 is smaller than base depth 2; growth only deepens"),
        (
            {"depth_operator": None},
            {"depth": 4},
            "target depth 4 differs from base depth 2 and depth_operator is None; use depth 2",
        ),
        (
            {},
            {"depth": 3},
            "cannot stack depth 2 into 3: ratio 1.5 is not an integer; 2 or 4 work",
        ),
        (
            {"depth_operator": "interleave"},
            {"depth": 5},
            "cannot interleave depth 2 into 5: ratio 2.5 is not an integer; 4 or 6 work",
        ),
        ({}, {"depth": 4}, "base_depth must be the same in base and target: 2 is not 4"),
        (
            {},
            {"norm_eps": 1e-6},
            "norm_eps must be the same in base and target: 1e-05 is not 1e-06",
        ),
        ({}, {"group_size": 2}, "group_size must be the same in base and target: 1 is not 2"),
        ({}, {"base_width": None}, "base_width must be the same in base and target: 16 is not 24"),
        (
            {"operator": "clone"},
            {},
            "cannot clone width 16 into 24: ratio 1.5 is not an integer; 16 or 32 work",
        ),
        (
            {"operator": "hyperclone"},
            {"width": 40},
            "cannot hyperclone width 16 into 40: ratio 2.5 is not an integer; 32 or 48 work",
        ),
        ({"noise": 0.1}, {}, "noise 0.1 needs operator clone, hyperclone or net2net"),
        ({"optimizer_state": "transfer"}, {}, "optimizer_state transfer needs operator clone"),
    ],
)
def test_what_cannot_be_grown_is_refused_with_its_numbers(options, target, message):
    base = ModelSpec(width=16, depth=2, head_dim=4)
    wide = ModelSpec(**({"width": 24, "depth": 2, "head_dim": 4, "base_width": 16} | target))
    with pytest.raises(ValueError) as caught:
        grow(tensors_of(base), base, wide, GrowthOptions(**options), seeded())
    assert message in str(caught.value)
