"""Growth in width of a single tensor (METHOD §3), by two families of operators on axes.

- Padding keeps the base units first and appends new units.
- Copying repeats units and divides each sum over copies by their number, to keep the function.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from warmcore.growth.units import UnitMap
from warmcore.model.mup import GAINS, multipliers, role_of
from warmcore.specs import ModelSpec

Maps = Sequence[UnitMap | None]


def pad_shrunk(name: str, tensor: Tensor, shape: torch.Size, *, shrink: float) -> Tensor:
    """Return s pad0(W_base), or 1 + s pad0(gain - 1) for gains, which do nothing at 1.

    Adding p times the target's initial value over the whole tensor gives `shrink_perturb` (arXiv
    2411.07340, after arXiv 1910.08475). s = 0 and p = 1 is a cold start.
    """
    idle = 1.0 if role_of(name) in GAINS else 0.0
    return pad_to_shape(shrink * tensor + (1 - shrink) * idle, shape, fill=idle)


def pad_to_shape(tensor: Tensor, shape: torch.Size, *, fill: float) -> Tensor:
    """Put `tensor` first on every axis, and `fill` elsewhere; widths are whole units."""
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
    """Copy each unit, and divide the weights of inputs by the number of copies of the input.

    Hidden matrices and the unembedding sum over all copies of each input. For the unembedding the
    forward multiplier already divides by the ratio of widths under muP. The remaining divisor is 1
    at integer ratios.
    """
    # Example: y = W x with a single input and W = (6). With two copies of x, W becomes (3, 3):
    # 3 x + 3 x = 6 x.
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
    """Subtract from the noise the mean over the copies of each input, and restore its variance.

    Copies have equal values, and noise that sums to zero over them keeps the function. For two
    copies it is a pair of opposite signs (arXiv 2409.12903). An input with a single copy gets no
    noise.
    """
    # Subtracting the mean of c numbers multiplies their variance by (c - 1)/c: the last factor
    # undoes that. Example, c = 2: noise (3, 1) becomes (1, -1) and then (1.41, -1.41).
    num_copies = inputs.num_copies.to(noise.dtype)
    sums = noise.new_zeros(len(noise), int(inputs.source.max()) + 1)
    sums.index_add_(1, inputs.source, noise)
    noise.sub_(sums.index_select(1, inputs.source).div_(num_copies))
    return noise.mul_((num_copies / (num_copies - 1).clamp(min=1)).sqrt())


def gradient_scale(name: str, maps: Maps, base: ModelSpec, target: ModelSpec) -> Tensor:
    """Return the target's gradient over the base's, in float64, to be broadcast over the tensor.

    An output with c copies has 1/c of the gradient, because the weights that read it were divided
    by c. For the unembedding the factor is the ratio of the logit multipliers. Without maps
    (padding) it is muP's scaling of gradients, 1/m; epsilon scales in the same way.
    """
    # The last axis of the embedding and the first axis of other tensors are outputs.
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
    """Return a mask of the elements at the first copy of their unit on every axis."""
    mask = torch.ones((), dtype=torch.bool)
    for unit_map in maps:
        mask = mask.unsqueeze(-1)
        if unit_map is not None:
            mask = mask & unit_map.is_first
    return mask
