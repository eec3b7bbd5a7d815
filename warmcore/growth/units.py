"""Axes of tensors, the units that growth never splits, and which unit is a copy of which.

Each axis of a tensor is of one kind, and a kind is made of units: a feature of the residual stream,
a feed-forward feature, a key/value head, or a query head together with all heads of its group.
Query and key/value axes of a layer share one map, so that each query head still meets its own keys.
"""

from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Generator, Tensor

from warmcore.specs import CopyingOperator, ModelSpec

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


def axis_kinds(name: str) -> tuple[Axis, ...]:
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


@dataclass(frozen=True, kw_only=True, eq=False)
class UnitMap:
    """Target unit j is a copy of base unit `source[j]`; every base unit has a copy.

    That unit has `num_copies[j]` copies, and no earlier one where `is_first[j]`.
    """

    source: Tensor
    num_copies: Tensor
    is_first: Tensor

    @classmethod
    def from_sources(cls, source: Tensor) -> Self:
        """Return the map of all units of an axis."""
        place = torch.arange(len(source))
        first = torch.full_like(place, len(place)).scatter_reduce(0, source, place, "amin")
        return cls(
            source=source,
            num_copies=torch.bincount(source)[source],
            is_first=first[source] == place,
        )

    def select_units(self, units: slice) -> Self:
        """Return the part of the map that is about some of the target's units."""
        return type(self)(
            source=self.source[units],
            num_copies=self.num_copies[units],
            is_first=self.is_first[units],
        )

    def expand_to_features(self, size: int) -> "UnitMap":
        """Return the map of single features, for units of `size` of them."""
        features = self.source.view(-1, 1) * size + torch.arange(size)
        return UnitMap.from_sources(features.flatten())


def make_unit_map(
    operator: CopyingOperator, num_base: int, num_target: int, generator: Generator
) -> UnitMap:
    """Copies side by side (clone), in tiles (hyperclone), or at random but balanced (net2net).

    net2net keeps the base's units first (arXiv 1511.05641) and then appends whole permutations, so
    that at an integer ratio k every unit has exactly k copies, and else one more or one less.
    """
    place = torch.arange(num_target)
    match operator:
        case "clone":
            return UnitMap.from_sources(place // (num_target // num_base))
        case "hyperclone":
            return UnitMap.from_sources(place % num_base)
        case "net2net":
            rounds = (num_target - 1) // num_base
            added = [torch.randperm(num_base, generator=generator) for _ in range(rounds)]
            return UnitMap.from_sources(torch.cat([torch.arange(num_base), *added])[:num_target])


class Copies:
    """The maps of a whole model: one for the residual stream, one per layer for heads and ffn."""

    def __init__(
        self, base: ModelSpec, target: ModelSpec, operator: CopyingOperator, generator: Generator
    ) -> None:
        def draw_map(num_base: int, num_target: int) -> UnitMap:
            return make_unit_map(operator, num_base, num_target, generator)

        self._base = base
        self._residual = draw_map(base.width, target.width)
        self._heads, self._ffn = [], []
        for _ in range(target.depth):
            self._heads.append(draw_map(base.num_kv_heads, target.num_kv_heads))
            self._ffn.append(draw_map(base.ffn_width, target.ffn_width))

    def maps_along_axes(self, name: str) -> list[UnitMap | None]:
        """Maps of features along each axis of the target's tensor `name`; None for the vocab."""
        return [self._find_map(axis, name) for axis in axis_kinds(name)]

    def _find_map(self, axis: Axis, name: str) -> UnitMap | None:
        match axis:
            case "vocab":
                return None
            case "residual":
                return self._residual
            case "ffn":
                return self._ffn[int(name.split(".")[1])]
            case "query" | "key_value":
                heads = self._heads[int(name.split(".")[1])]
                return heads.expand_to_features(unit_size(axis, self._base))
