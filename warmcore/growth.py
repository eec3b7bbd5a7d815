"""Growth in width: a target's initial tensors from a base checkpoint's (METHOD §3).

Every tensor is grown by itself, by role, from its base tensor and the generator, so tensors can be
streamed. Each axis of a tensor is of one kind, and a kind is made of units that are never split: a
feature of the residual stream, a feed-forward feature, a key/value head, or a query head together
with all heads of its group. Two families of operators act on axes:

- padding keeps the base units first and appends new ones;
- copying fills unit j of the target with base unit `index[j]`; function-preserving, as a sum over
  copies is divided by their number.
"""

from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from torch import Generator, Tensor

from warmcore.model import parameter_shapes
from warmcore.mup import fresh_, multipliers, role_of
from warmcore.spec import GrowthOptions, ModelSpec

Axis = Literal["vocab", "residual", "query", "key_value", "ffn"]


# Matrices are [out, in]; what is not here is a gain.
AXES: dict[str, tuple[Axis, ...]] = {
    "embedding": ("vocab", "residual"),
    "unembedding": ("vocab", "residual"),
    "q": ("query", "residual"),
    "k": ("key_value", "residual"),
    "v": ("key_value", "residual"),
    "o": ("residual", "query"),
    "gate": ("ffn", "residual"),
    "up": ("ffn", "residual"),
    "down": ("residual", "ffn"),
}


def axes_of(name: str) -> tuple[Axis, ...]:
    """Kinds of a tensor's axes."""
    return AXES.get(name.split(".")[-2], ("residual",))


def unit_size(axis: Axis, model: ModelSpec) -> int:
    """Features that stay together on this kind of axis: a whole group of query heads, METHOD §3."""
    match axis:
        case "query":
            return model.head_dim * model.group_size
        case "key_value":
            return model.head_dim
        case "vocab" | "residual" | "ffn":
            return 1


def grow(
    base_tensors: Mapping[str, Tensor],
    base: ModelSpec,
    target: ModelSpec,
    options: GrowthOptions,
    generator: Generator,
) -> dict[str, Tensor]:
    """Return every tensor of the target, in the dtype of the base's.

    Raises:
        ValueError: the operator cannot grow `base` into `target`.
    """
    return dict(iter_grown(base_tensors, base, target, options, generator))


def iter_grown(
    base_tensors: Mapping[str, Tensor],
    base: ModelSpec,
    target: ModelSpec,
    options: GrowthOptions,
    generator: Generator,
) -> Iterator[tuple[str, Tensor]]:
    """Yield the target's tensors one by one, in the order of its state dict."""
    options.check(base, target)
    for name, shape in parameter_shapes(target).items():
        tensor = base_tensors[name]
        match options.operator:
            case "shrink_perturb":
                grown = pad_shrunk(name, tensor, shape, shrink=options.shrink)
                noise = options.perturb
            case "zero_pad":
                grown = pad_shrunk(name, tensor, shape, shrink=1.0)
                noise = 0.0
            case "clone":
                grown = clone(name, tensor, base, target)
                noise = options.noise
        role = role_of(name)
        if noise and role != "gain":
            grown += noise * fresh_(torch.empty(shape), role, target, generator).to(grown.dtype)
        yield name, grown


def pad_shrunk(name: str, tensor: Tensor, shape: torch.Size, *, shrink: float) -> Tensor:
    """Return s pad0(W_base); for gains, which do nothing at 1, 1 + s pad0(gain - 1).

    With p eps, the target's own initial value over the whole tensor, this is `shrink_perturb`
    (arXiv 2411.07340, after arXiv 1910.08475); s = 0 and p = 1 is a cold start.
    """
    idle = 1.0 if role_of(name) == "gain" else 0.0
    return pad(shrink * tensor + (1 - shrink) * idle, shape, fill=idle)


def pad(tensor: Tensor, shape: torch.Size, *, fill: float) -> Tensor:
    """Put `tensor` first on every axis. Whole units are appended, as widths are whole units."""
    grown = tensor.new_full(shape, fill)
    grown[tuple(slice(size) for size in tensor.shape)] = tensor
    return grown


def clone(name: str, tensor: Tensor, base: ModelSpec, target: ModelSpec) -> Tensor:
    """Repeat each unit k times and divide what sums over copies by k; arXiv 2602.10545.

    Hidden matrices sum over k copies of each input. So does the unembedding, whose forward
    multiplier already divides by k under muP; what is left of k there is 1.
    """
    ratio = target.width // base.width
    copied = copy_units(tensor, name, base, ratio)
    match role_of(name):
        case "hidden":
            return copied / ratio
        case "unembedding":
            return copied / (ratio * multipliers(target).logits / multipliers(base).logits)
        case "embedding" | "gain":
            return copied


def copy_units(tensor: Tensor, name: str, base: ModelSpec, ratio: int) -> Tensor:
    """Fill each axis with copies of its units, those of one unit side by side."""
    for dim, axis in enumerate(axes_of(name)):
        if axis != "vocab":
            features = torch.arange(tensor.shape[dim]).view(-1, unit_size(axis, base))
            index = features.repeat_interleave(ratio, dim=0).flatten()
            tensor = tensor.index_select(dim, index)
    return tensor


def grow_optimizer(
    base_state: Mapping[str, Tensor], base: ModelSpec, target: ModelSpec, options: GrowthOptions
) -> dict[str, Tensor]:
    """Adam's state for the target, as `<parameter>.<key>`; empty for a fresh optimizer.

    The gradient of each of k copies is 1/k of the unit's, so m becomes m/k and v becomes v/k^2,
    copied as the weights are. `transfer_old_reset_new` keeps that for the first copy only.
    """
    if options.optimizer_state == "reset":
        return {}
    ratio = target.width // base.width
    grown: dict[str, Tensor] = {}
    for entry, tensor in base_state.items():
        name, key = entry.rsplit(".", 1)
        if key == "step":
            grown[entry] = tensor.clone()
            continue
        scale = _gradient_scale(name, base, target) ** (2 if key == "exp_avg_sq" else 1)
        grown[entry] = copy_units(tensor, name, base, ratio) * scale
        if options.optimizer_state == "transfer_old_reset_new":
            grown[entry] *= _is_first_copy(name, tensor, base, ratio)
    return grown


def _gradient_scale(name: str, base: ModelSpec, target: ModelSpec) -> float:
    """Gradient of a copy over its unit's: 1/k, for logits the ratio of their multipliers."""
    if role_of(name) == "unembedding":
        return multipliers(target).logits / multipliers(base).logits
    return base.width / target.width


def _is_first_copy(name: str, tensor: Tensor, base: ModelSpec, ratio: int) -> Tensor:
    """1 where every axis is at the first copy of its unit, 0 elsewhere."""
    mask = tensor.new_ones(())
    for dim, axis in enumerate(axes_of(name)):
        mask = mask.unsqueeze(-1)
        if axis != "vocab":
            unit = unit_size(axis, base)
            copies = torch.arange(tensor.shape[dim] // unit * ratio) % ratio
            mask = mask * (copies == 0).repeat_interleave(unit)
    return mask
