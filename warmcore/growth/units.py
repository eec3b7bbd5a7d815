"""Axes of tensors, the units that growth never splits, and maps from target units to base units.

Each axis of a tensor has a kind, and a kind consists of units: a feature of the residual stream, a
feed-forward feature, a key/value head, or a query head together with all heads of its group. Query
and key/value axes of a layer share a map. Each query head therefore still meets its own keys.
"""

from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Generator, Tensor

from warmcore.specs import CopyingOperator, ModelSpec

Axis = Literal["vocab", "residual", "query", "key_value", "ffn"]

# Matrices are [out, in]. A tensor that is not in this table is a gain.
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
    """Return the kinds of a tensor's axes."""
    return AXES.get(name.split(".")[-2], ("residual",))


def unit_size(axis: Axis, model: ModelSpec) -> int:
    """Return the number of features in a unit of this kind of axis (METHOD §3)."""
    # Example: head_dim 16 and group_size 4. A unit is 64 query features (4 heads), or the 16 key
    # features that those 4 heads share.
    match axis:
        case "query":
            return model.head_dim * model.group_size
        case "key_value":
            return model.head_dim
        case "vocab" | "residual" | "ffn":
            return 1


@dataclass(frozen=True, kw_only=True, eq=False)
class UnitMap:
    """A map of an axis: target unit j is a copy of base unit `source[j]`.

    That base unit has `num_copies[j]` copies, and j is the first of them if `is_first[j]`. Every
    base unit has a copy. Example: source (0, 1, 0) has num_copies (2, 1, 2) and is_first
    (True, True, False).
    """

    source: Tensor
    num_copies: Tensor
    is_first: Tensor

    @classmethod
    def from_sources(cls, source: Tensor) -> Self:
        """Return the map of all units of an axis, from the base unit of each."""
        # `first[i]` becomes the smallest place of a copy of base unit i.
        place = torch.arange(len(source))
        first = torch.full_like(place, len(place)).scatter_reduce(0, source, place, "amin")
        return cls(
            source=source,
            num_copies=torch.bincount(source)[source],
            is_first=first[source] == place,
        )

    def select_units(self, units: slice) -> Self:
        """Return the part of the map for some of the target's units."""
        return type(self)(
            source=self.source[units],
            num_copies=self.num_copies[units],
            is_first=self.is_first[units],
        )

    def expand_to_features(self, size: int) -> "UnitMap":
        """Return the map of single features, for units of `size` features."""
        # Example: source (0, 0) of heads of 2 features becomes (0, 1, 0, 1).
        features = self.source.view(-1, 1) * size + torch.arange(size)
        return UnitMap.from_sources(features.flatten())


def make_unit_map(
    operator: CopyingOperator, num_base: int, num_target: int, generator: Generator
) -> UnitMap:
    """Return copies side by side (clone), in tiles (hyperclone), or balanced random (net2net).

    net2net keeps the base's units first (arXiv 1511.05641) and then appends whole permutations. At
    an integer ratio k every unit has exactly k copies, otherwise k or k + 1.
    """
    # Example, 2 units to 4: clone 0 0 1 1, hyperclone 0 1 0 1, net2net 0 1 and then 0 1 or 1 0.
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
    """The maps of a model: of the residual stream, and per layer of the heads and of the ffn."""

    def __init__(
        self, base: ModelSpec, target: ModelSpec, operator: CopyingOperator, generator: Generator
    ) -> None:
        def draw_map(num_base: int, num_target: int) -> UnitMap:
            return make_unit_map(operator, num_base, num_target, generator)

        # The order of these draws decides net2net's random maps: it must not change.
        self._base = base
        self._residual = draw_map(base.width, target.width)
        self._heads, self._ffn = [], []
        for _ in range(target.depth):
            self._heads.append(draw_map(base.num_kv_heads, target.num_kv_heads))
            self._ffn.append(draw_map(base.ffn_width, target.ffn_width))

    def maps_along_axes(self, name: str) -> list[UnitMap | None]:
        """Return the map of each axis of the target's tensor `name`; None for the vocabulary."""
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
