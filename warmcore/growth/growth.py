"""Growth of a base's tensors, and its optimizer's, into a target's initial tensors (METHOD §3).

The base is first deepened (`warmcore.growth.depth`), then widened (`warmcore.growth.width`). Each
tensor depends only on its role, its base tensor and the generator. Tensors are made in blocks of
rows, and no element depends on the division into blocks: the target can be streamed.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Generator, Tensor

from warmcore.growth.depth import Deepening
from warmcore.growth.units import Copies
from warmcore.growth.width import (
    Maps,
    cancel_over_copies_,
    copy_and_divide,
    copy_units,
    first_copy_mask,
    gradient_scale,
    pad_shrunk,
    pad_to_shape,
)
from warmcore.model.decoder import parameter_shapes
from warmcore.model.mup import GAINS, draw_initial_, role_of
from warmcore.specs import GrowthOptions, ModelSpec, growth_rules
from warmcore.tensors.files import saving_order
from warmcore.tensors.row_blocks import make_ahead, split_rows


@dataclass(frozen=True, kw_only=True)
class Moment:
    """A tensor of the target's optimizer, `<parameter>.<key>`, and the base tensor `source`."""

    parameter: str
    key: str
    source: str

    @property
    def name(self) -> str:
        """The name among the optimizer's tensors."""
        return f"{self.parameter}.{self.key}"


@dataclass(frozen=True, kw_only=True, eq=False)
class GrownBlock:
    """Some rows of a target's tensor: their shape, and the base tensor and maps to make them."""

    name: str
    source: Tensor
    maps: Maps
    shape: torch.Size


@dataclass(frozen=True, kw_only=True, eq=False)
class Growth:
    """The plan of a growth, decided before the first tensor: layers, copies, shapes."""

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
        """Plan the growth; only net2net takes random numbers from `generator`.

        Raises:
            ValueError: the operators cannot grow `base` into `target`.
        """
        growth_rules.check_growth(options, base, target)
        operator = options.copying_operator
        return cls(
            base=base,
            target=target,
            options=options,
            shapes=parameter_shapes(target),
            depth=Deepening.plan(base, target, options.depth_operator),
            copies=Copies(base, target, operator, generator) if operator else None,
        )

    def grow_weights(
        self, base_tensors: Mapping[str, Tensor], generator: Generator
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield the target in blocks, in the order of its state dict and the dtype of the base."""
        # Noise is drawn in a thread a few blocks ahead; the order of the draws stays the same.
        noises = make_ahead(self._draw_noises(generator))
        for name in self.shapes:
            for block in self._split_into_blocks(
                name, self.depth.deepen_tensor(base_tensors, name)
            ):
                yield name, self._widen_and_perturb(block, next(noises))

    def grow_moments(self, base_state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield the target's optimizer state in blocks; nothing for a fresh optimizer."""
        # Example: growth from width 64 to 128 by clone. A hidden weight w becomes w/2 at four
        # places, each with half of the old gradient. The first moment m becomes m/2, the second
        # moment v becomes v/4, and Adam's step m / sqrt(v) stays as large as in the base.
        for moment in self.list_moments(base_state):
            tensor = base_state[moment.source]
            if moment.key == "step":
                yield moment.name, self._grow_step_count(moment, tensor)
                continue
            for block in self._split_into_blocks(moment.parameter, tensor):
                yield moment.name, self._grow_moment(moment, block)

    def list_moments(self, base_names: Iterable[str]) -> list[Moment]:
        """Return the tensors of the target's optimizer, in the order of `optimizer_tensors`."""
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

    def _split_into_blocks(self, name: str, tensor: Tensor) -> Iterator[GrownBlock]:
        """Split the target's tensor into blocks of rows.

        Copying selects the units of a block. Padding takes the same rows of the base, if it has
        them. Example: of 24 base rows, target rows 0 to 15 get 16, 16 to 31 get 8, and 32 to 47
        none.
        """
        shape = self.shapes[name]
        maps: Maps = self.copies.maps_along_axes(name) if self.copies else ()
        for rows in split_rows(shape):
            block = torch.Size((rows.stop - rows.start, *shape[1:]))
            if maps and maps[0] is not None:
                parts = (maps[0].select_units(rows), *maps[1:])
                yield GrownBlock(name=name, source=tensor, maps=parts, shape=block)
            else:
                yield GrownBlock(name=name, source=tensor[rows], maps=maps, shape=block)

    def _widen_block(self, block: GrownBlock) -> Tensor:
        if self.copies:
            return copy_and_divide(block.name, block.source, block.maps, self.base, self.target)
        shrink = 1.0 if self.options.operator == "zero_pad" else self.options.shrink
        return pad_shrunk(block.name, block.source, block.shape, shrink=shrink)

    def _draw_noises(self, generator: Generator) -> Iterator[Tensor | None]:
        """Draw the noise of each block, of the target's initial size; gains get no noise."""
        # Every block consumes its random numbers, in the order of the state dict. The noise of a
        # tensor is thus the same for any division into blocks, and for streaming to the disk.
        # Example: a [1024, 512] tensor is drawn as two blocks of 512 rows, equal to a single draw.
        for name, shape in self.shapes.items():
            role = role_of(name)
            for rows in split_rows(shape):
                if not self.options.noise_scale or role in GAINS:
                    yield None
                else:
                    block = torch.empty(rows.stop - rows.start, *shape[1:])
                    yield draw_initial_(block, role, self.target, generator)

    def _widen_and_perturb(self, block: GrownBlock, noise: Tensor | None) -> Tensor:
        """Widen a block, and add `options.noise_scale` times the noise."""
        if noise is None:
            return self._widen_block(block)
        role = role_of(block.name)
        noise = noise.to(block.source.dtype).mul_(self.options.noise_scale)
        base_part = tuple(slice(size) for size in block.source.shape)
        match self.options.operator:
            case "shrink_perturb":
                # The padding is zero plus noise. Adding the old part to the noise saves the zeros.
                noise[base_part] += self.options.shrink * block.source
                return noise
            case "slice" | "zero_pad":
                grown = self._widen_block(block)
                grown[base_part] += noise[base_part]
                return grown
            case "clone":
                return self._widen_block(block).add_(noise)
            case "hyperclone" | "net2net":
                inputs = block.maps[-1]
                assert inputs is not None
                grown = self._widen_block(block)
                return (
                    grown if role == "embedding" else grown.add_(cancel_over_copies_(noise, inputs))
                )

    def _is_reset(self, moment: Moment) -> bool:
        """Return whether the tensor is of a new layer whose optimizer state starts at zero."""
        layer, rule = self.depth.find_layer(moment.parameter), self.options.optimizer_state
        fresh_layer = self.options.depth_operator == "identity" or rule != "transfer"
        return layer is not None and layer.is_new and fresh_layer

    def _grow_step_count(self, moment: Moment, tensor: Tensor) -> Tensor:
        return torch.zeros_like(tensor) if self._is_reset(moment) else tensor.clone()

    def _grow_moment(self, moment: Moment, block: GrownBlock) -> Tensor:
        """Grow a moment by the weights' maps, times the gradient's scale; reset parts get zeros."""
        # The second moment `exp_avg_sq` is of squared gradients: its factor is squared too.
        name, tensor, maps = block.name, block.source, block.maps
        if self._is_reset(moment):
            return tensor.new_zeros(block.shape)
        scale = gradient_scale(name, maps, self.base, self.target) * self.depth.gradient_scale(name)
        factor = (scale ** (2 if moment.key == "exp_avg_sq" else 1)).to(tensor.dtype)
        if not self.copies:
            return pad_to_shape(tensor * factor, block.shape, fill=0.0)
        grown = copy_units(tensor, maps).mul_(factor)
        is_kept = self.options.optimizer_state == "transfer"
        return grown if is_kept else grown.mul_(first_copy_mask(maps))
