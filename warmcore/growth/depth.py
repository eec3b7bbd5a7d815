"""Growth in depth: which base layer each layer of the target is made from (METHOD §3).

`stack` repeats the whole model (arXiv 2405.15319), `interleave` each layer in place; weights are
copied as they are and the residual multiplier follows CompleteP, so k copies of a layer each add
1/k of what it added. `identity` inserts layers that add nothing, spread evenly, and keeps the
function: where the residual multiplier changes, the old layers' output projections undo it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from warmcore.model.mup import multipliers
from warmcore.specs import DepthOperator, ModelSpec

OUTPUTS = ("o", "down")


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A target layer: the base layer it is made from, and whether that has been used before."""

    source: int
    is_new: bool


def plan_layers(base: int, target: int, operator: DepthOperator | None) -> tuple[Layer, ...]:
    """Layers of the target, from the bottom; depths are numbers of layers."""
    match operator:
        case "stack" | None:
            sources = [layer % base for layer in range(target)]
        case "interleave" | "identity":
            sources = [layer * base // target for layer in range(target)]
    return tuple(
        Layer(source=source, is_new=source in sources[:place])
        for place, source in enumerate(sources)
    )


@dataclass(frozen=True, kw_only=True)
class Deepening:
    """The base's tensors under the target's names, at the base's width."""

    layers: tuple[Layer, ...]
    operator: DepthOperator | None
    residual_ratio: float

    @classmethod
    def plan(
        cls, base: ModelSpec, target: ModelSpec, operator: DepthOperator | None
    ) -> "Deepening":
        """Choose the layers; the ratio is of the base's residual multiplier to the target's."""
        return cls(
            layers=plan_layers(base.depth, target.depth, operator),
            operator=operator,
            residual_ratio=multipliers(base).residual / multipliers(target).residual,
        )

    def find_layer(self, name: str) -> Layer | None:
        """Layer of a tensor; None outside the blocks."""
        parts = name.split(".")
        return self.layers[int(parts[1])] if parts[0] == "blocks" else None

    def base_name(self, name: str) -> str:
        """Name in the base of the tensor that the target's `name` is made from."""
        layer = self.find_layer(name)
        if layer is None:
            return name
        return ".".join(["blocks", str(layer.source), *name.split(".")[2:]])

    def deepen_tensor(self, base_tensors: Mapping[str, Tensor], name: str) -> Tensor:
        """Return the tensor of the deepened base; W_out base/target multiplier for `identity`."""
        tensor = base_tensors[self.base_name(name)]
        if self.operator != "identity" or name.split(".")[-2] not in OUTPUTS:
            return tensor
        layer = self.find_layer(name)
        assert layer is not None
        return tensor * (0.0 if layer.is_new else self.residual_ratio)

    def gradient_scale(self, name: str) -> float:
        """Gradient of an old layer's tensor over what it was in the base.

        `identity` keeps the function, so only what was rescaled has another gradient. Elsewhere it
        is first order: a branch that is multiplied by less gets less.
        """
        if self.find_layer(name) is None:
            return 1.0
        if self.operator == "identity" and name.split(".")[-2] not in OUTPUTS:
            return 1.0
        return 1 / self.residual_ratio
