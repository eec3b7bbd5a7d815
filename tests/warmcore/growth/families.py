"""Bases, targets and their tensors, for the laws of growth; float64."""

import torch
from hypothesis import strategies as st

from warmcore.growth.growth import Growth
from warmcore.model.decoder import Decoder, parameter_shapes
from warmcore.specs import ModelSpec

CONTEXT = 12
PADDING = ("shrink_perturb", "slice", "zero_pad")
COPYING = ("clone", "hyperclone", "net2net")
TOKENS = torch.arange(2 * CONTEXT).view(2, CONTEXT) % 7


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def grow(tensors, base, target, options, generator):
    plan = Growth.plan(base, target, options, generator)
    return dict(plan.grow_weights(tensors, generator))


def grow_optimizer(state, base, target, options, generator=None):
    return dict(Growth.plan(base, target, options, generator or seeded()).grow_moments(state))


def tensors_of(spec, seed=0):
    """Return tensors with random values in every element, gains included."""
    generator = seeded(seed)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in parameter_shapes(spec).items()
    }


def moments_of(base):
    tensors = tensors_of(base)
    state = {f"{name}.exp_avg": t for name, t in tensors.items()}
    state |= {f"{name}.exp_avg_sq": t.square() for name, t in tensors.items()}
    return state | {f"{name}.step": torch.tensor(7.0) for name in tensors}


def model_of(spec, tensors):
    model = Decoder(spec, context=CONTEXT).double()
    model.load_state_dict(tensors)
    return model


def logits(spec, tensors):
    return model_of(spec, tensors)(TOKENS)


def relative_gap(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def wider(spec, ratio, *, depth=None):
    width = spec.width * ratio
    assert width == int(width)
    return spec.model_copy(
        update={
            "width": int(width),
            "depth": depth or spec.depth,
            "base_width": spec.base_width or spec.width,
            "base_depth": spec.base_depth or spec.depth,
        }
    )


@st.composite
def bases(draw):
    head_dim = draw(st.sampled_from([2, 4]))
    group_size = draw(st.sampled_from([1, 2]))
    block = head_dim * group_size
    return ModelSpec(
        width=block * draw(st.integers(1, 3)),
        depth=draw(st.integers(1, 3)),
        head_dim=head_dim,
        group_size=group_size,
        ffn_ratio=draw(st.sampled_from([2.0, 3.0])),
        vocab_size=7,
        base_width=draw(st.sampled_from([None, block])),
        base_depth=draw(st.sampled_from([None, 1, 2])),
        parametrization=draw(st.sampled_from(["mup", "standard"])),
        unembedding_std=draw(st.sampled_from([0.0, 0.2])),
    )


none = st.just(0)
any_ratio = st.sampled_from([1, 2, 3, 4])


@st.composite
def families(draw, ratios=any_ratio, added_layers=none):
    """Draw a base and a wider target of the same family, deeper by some layers."""
    base = draw(bases())
    return base, wider(base, draw(ratios), depth=base.depth + draw(added_layers))


@st.composite
def unequal_families(draw, added_layers=none):
    """Draw a target of any width in whole heads, multiples of the base's width or not."""
    base = draw(bases())
    block = base.head_dim * base.group_size
    width = base.width + block * draw(st.integers(1, 4))
    deeper = wider(base, 1, depth=base.depth + draw(added_layers))
    return base, deeper.model_copy(update={"width": width})
