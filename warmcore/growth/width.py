"""Growth in width, one tensor at a time (METHOD §3). Two families of operators act on axes.

- padding keeps the base units first and appends new ones;
- copying repeats units; function-preserving, as a sum over copies is divided by their number.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from warmcore.growth.units import UnitMap
from warmcore.model.mup import GAINS, multipliers, role_of
from warmcore.specs import ModelSpec

Maps = Sequence[UnitMap | None]


def pad_shrunk(name: str, tensor: Tensor, shape: torch.Size, *, shrink: float) -> Tensor:
    """Return s pad0(W_base); for gains, which do nothing at 1, 1 + s pad0(gain - 1).

    With p eps, the target's own initial value over the whole tensor, this is `shrink_perturb`
    (arXiv 2411.07340, after arXiv 1910.08475); s = 0 and p = 1 is a cold start.
    """
    idle = 1.0 if role_of(name) in GAINS else 0.0
    return pad_to_shape(shrink * tensor + (1 - shrink) * idle, shape, fill=idle)


def pad_to_shape(tensor: Tensor, shape: torch.Size, *, fill: float) -> Tensor:
    """Put `tensor` first on every axis. Whole units are appended, as widths are whole units."""
    grown = tensor.new_full(shape, fill)
    grown[tuple(slice(size) for size in tensor.shape)] = tensor
    return grown


def copy_units(tensor: Tensor, maps: Maps) -> Tensor:
    """Fill each axis with copies of its units."""
    for dim, unit_map in enumerate(maps):
        if unit_map is not None:
            tensor = tensor.index_select(dim, unit_map.source)
    return tensor


def copy_and_divide(
    name: str, tensor: Tensor, maps: Maps, base: ModelSpec, target: ModelSpec
) -> Tensor:
    """Copy each unit and divide what sums over copies by their number.

    Hidden matrices sum over all copies of each input. So does the unembedding, whose forward
    multiplier already divides by the ratio of widths under muP; the rest is 1 at integer ratios.
    """
    copied = copy_units(tensor, maps)
    inputs = maps[-1]
    assert inputs is not None
    num_copies = inputs.num_copies.double()
    match role_of(name):
        case "hidden":
            return copied.div_(num_copies.to(copied.dtype))
        case "unembedding":
            divisor = num_copies * multipliers(target).logits / multipliers(base).logits
            return copied.div_(divisor.to(copied.dtype))
        case "embedding" | "gain" | "final_gain":
            return copied


def cancel_over_copies_(noise: Tensor, inputs: UnitMap) -> Tensor:
    """Take from the noise on each input's copies their mean, and keep its variance.

    Copies have equal values, so noise that sums to zero over them keeps the function; for two
    copies it is a pair of opposite signs (arXiv 2409.12903). An input with one copy gets none.
    """
    num_copies = inputs.num_copies.to(noise.dtype)
    sums = noise.new_zeros(len(noise), int(inputs.source.max()) + 1)
    sums.index_add_(1, inputs.source, noise)
    noise.sub_(sums.index_select(1, inputs.source).div_(num_copies))
    return noise.mul_((num_copies / (num_copies - 1).clamp(min=1)).sqrt())


def gradient_scale(name: str, maps: Maps, base: ModelSpec, target: ModelSpec) -> Tensor:
    """Gradient of the target's tensor over the base's, as float64 that broadcasts.

    What is written to c copies has 1/c of the gradient, as its readers were divided by c. For the
    unembedding it is the ratio of the logit multipliers. Without maps (padding) it is muP's own
    scaling of gradients, 1/m, by which epsilon goes as well.
    """
    role = role_of(name)
    if role == "unembedding":
        ratio = multipliers(target).logits / multipliers(base).logits
        return torch.tensor(ratio, dtype=torch.float64)
    written = maps[-1 if role == "embedding" else 0] if maps else None
    if written is None:
        return torch.tensor(base.width / target.width, dtype=torch.float64)
    scale = 1 / written.num_copies.double()
    return scale.view(-1, 1) if role == "hidden" else scale


def first_copy_mask(maps: Maps) -> Tensor:
    """Whether an element is at the first copy of its unit on every axis, as a mask."""
    mask = torch.ones((), dtype=torch.bool)
    for unit_map in maps:
        mask = mask.unsqueeze(-1)
        if unit_map is not None:
            mask = mask & unit_map.is_first
    return mask
