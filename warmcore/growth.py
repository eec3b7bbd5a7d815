"""Growth: a target's initial tensors, and its optimizer's, from a base checkpoint's (METHOD §3).

The base is deepened first (`warmcore.depth`) and widened then (`warmcore.width`), each tensor by
itself, by role, from its base tensor and the generator. So tensors can be streamed.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Generator, Tensor

from warmcore.depth import Deepening
from warmcore.model import parameter_shapes
from warmcore.mup import GAINS, fresh_, role_of
from warmcore.optim import saving_order
from warmcore.spec import GrowthOptions, ModelSpec
from warmcore.units import Copies
from warmcore.width import (
    Maps,
    cancel_,
    copy,
    copy_units,
    gradient_scale,
    is_first_copy,
    pad,
    pad_shrunk,
)


@dataclass(frozen=True, kw_only=True)
class Moment:
    """A tensor of the target's optimizer: `<parameter>.<key>`, and what it is made from."""

    parameter: str
    key: str
    source: str

    @property
    def name(self) -> str:
        """Its name among the optimizer's tensors."""
        return f"{self.parameter}.{self.key}"


@dataclass(frozen=True, kw_only=True, eq=False)
class Growth:
    """All that is decided before the first tensor: layers, copies, shapes."""

    base: ModelSpec
    target: ModelSpec
    options: GrowthOptions
    shapes: Mapping[str, torch.Size]
    depth: Deepening
    copies: Copies | None

    @classmethod
    def plan(
        cls, base: ModelSpec, target: ModelSpec, options: GrowthOptions, generator: Generator
    ) -> Self:
        """Decide; only net2net draws.

        Raises:
            ValueError: the operators cannot grow `base` into `target`.
        """
        options.check(base, target)
        operator = options.copying_operator
        return cls(
            base=base,
            target=target,
            options=options,
            shapes=parameter_shapes(target),
            depth=Deepening.plan(base, target, options.depth_operator),
            copies=Copies(base, target, operator, generator) if operator else None,
        )

    def weights(
        self, base_tensors: Mapping[str, Tensor], generator: Generator
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield the target's tensors, in the order of its state dict and the dtype of the base."""
        for name in self.shapes:
            tensor = self.depth.tensor(base_tensors, name)
            old = tuple(slice(size) for size in tensor.shape)
            yield name, self._perturbed(name, self._widened(name, tensor), old, generator)

    def moments(self, base_state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield Adam's state for the target; nothing for a fresh optimizer."""
        for moment in self.moment_names(base_state):
            yield moment.name, self._moment(moment, base_state[moment.source])

    def moment_names(self, base_names: Iterable[str]) -> list[Moment]:
        """Tensors of the target's optimizer, in the order of `optimizer_tensors`."""
        if self.options.optimizer_state == "reset":
            return []
        keys: dict[str, list[str]] = defaultdict(list)
        for name in base_names:
            parameter, key = name.rsplit(".", 1)
            keys[parameter].append(key)
        sources = {name: self.depth.base_name(name) for name in self.shapes}
        moments = [
            Moment(parameter=name, key=key, source=f"{source}.{key}")
            for name, source in sources.items()
            for key in keys[source]
        ]
        return sorted(moments, key=lambda moment: saving_order(moment.name))

    def _widened(self, name: str, tensor: Tensor) -> Tensor:
        if self.copies:
            return copy(name, tensor, self.copies.along(name), self.base, self.target)
        shrink = 1.0 if self.options.operator == "zero_pad" else self.options.shrink
        return pad_shrunk(name, tensor, self.shapes[name], shrink=shrink)

    def _perturbed(
        self, name: str, grown: Tensor, old: tuple[slice, ...], generator: Generator
    ) -> Tensor:
        """Add noise of the target's initial size, `options.noise_scale` of it; gains have none."""
        role, scale = role_of(name), self.options.noise_scale
        if not scale or role in GAINS:
            return grown
        noise = fresh_(torch.empty(grown.shape), role, self.target, generator)
        noise = noise.to(grown.dtype).mul_(scale)
        match self.options.operator:
            case "shrink_perturb" | "clone" | "zero_pad":
                return grown.add_(noise)
            case "slice":
                grown[old] += noise[old]
                return grown
            case "hyperclone" | "net2net":
                assert self.copies is not None
                inputs = self.copies.along(name)[-1]
                assert inputs is not None
                return grown if role == "embedding" else grown.add_(cancel_(noise, inputs))

    def _moment(self, moment: Moment, tensor: Tensor) -> Tensor:
        """Grow as the weights are, times the gradient's scale; squared for a second moment.

        New units and layers that are to be reset have zeros; a whole new layer also a step of 0.
        """
        name, rule = moment.parameter, self.options.optimizer_state
        layer = self.depth.layer(name)
        fresh_layer = self.options.depth_operator == "identity" or rule != "transfer"
        is_reset = layer is not None and layer.is_new and fresh_layer
        if moment.key == "step":
            return torch.zeros_like(tensor) if is_reset else tensor.clone()
        if is_reset:
            return tensor.new_zeros(self.shapes[name])
        maps: Maps = self.copies.along(name) if self.copies else ()
        scale = gradient_scale(name, maps, self.base, self.target) * self.depth.gradient_scale(name)
        factor = (scale ** (2 if moment.key == "exp_avg_sq" else 1)).to(tensor.dtype)
        if not self.copies:
            return pad(tensor * factor, self.shapes[name], fill=0.0)
        grown = copy_units(tensor, maps).mul_(factor)
        return grown.mul_(is_first_copy(maps)) if rule == "transfer_old_reset_new" else grown
