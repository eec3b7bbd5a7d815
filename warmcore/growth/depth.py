"""Growth in depth: the base layer from which each layer of the target is made (METHOD §3).

`stack` repeats the whole model (arXiv 2405.15319), `interleave` repeats each layer in place. Both
copy weights unchanged. The residual multiplier follows CompleteP, hence k copies of a layer each
add 1/k of the output of that layer. `identity` inserts layers that add nothing, spread evenly, and
keeps the function: if the residual multiplier changes, the old layers' output projections undo it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from warmcore.model.mup import multipliers
from warmcore.specs import DepthOperator, ModelSpec

OUTPUTS = ("o", "down")


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A target layer: its base layer, and `is_new` if a lower layer has the same base layer."""

    source: int
    is_new: bool


def plan_layers(base: int, target: int, operator: DepthOperator | None) -> tuple[Layer, ...]:
    """Return the layers of the target, from the bottom; depths are numbers of layers."""
    # Example, depth 2 to 4: stack gives the sources 0 1 0 1, interleave and identity 0 0 1 1.
    # Identity also grows by ratios that are no integer: depth 2 to 3 gives 0 0 1.
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
    """The base with the target's depth: its tensors under the target's names, at its own width."""

    layers: tuple[Layer, ...]
    operator: DepthOperator | None
    residual_ratio: float

    @classmethod
    def plan(
        cls, base: ModelSpec, target: ModelSpec, operator: DepthOperator | None
    ) -> "Deepening":
        """Choose the layers, and compute the ratio of the residual multipliers, base to target."""
        # Example: depth 4 to 8 at base depth 4. The multipliers are 1 and 1/2, and the ratio is 2.
        return cls(
            layers=plan_layers(base.depth, target.depth, operator),
            operator=operator,
            residual_ratio=multipliers(base).residual / multipliers(target).residual,
        )

    def find_layer(self, name: str) -> Layer | None:
        """Return the layer of a tensor; None outside the blocks."""
        parts = name.split(".")
        return self.layers[int(parts[1])] if parts[0] == "blocks" else None

    def base_name(self, name: str) -> str:
        """Return the base's name of the tensor from which the target's `name` is made."""
        layer = self.find_layer(name)
        if layer is None:
            return name
        return ".".join(["blocks", str(layer.source), *name.split(".")[2:]])

    def deepen_tensor(self, base_tensors: Mapping[str, Tensor], name: str) -> Tensor:
        """Return the tensor `name` of the deepened base.

        For `identity` the output projections are scaled: by 0 in new layers, by the ratio in old.
        """
        tensor = base_tensors[self.base_name(name)]
        if self.operator != "identity" or name.split(".")[-2] not in OUTPUTS:
            return tensor
        layer = self.find_layer(name)
        assert layer is not None
        return tensor * (0.0 if layer.is_new else self.residual_ratio)

    def gradient_scale(self, name: str) -> float:
        """Return the factor by which an old layer's gradient differs from the base's.

        `identity` keeps the function: only rescaled tensors have another gradient. For the other
        operators the factor is right to first order: a branch with half the multiplier gets half
        the gradient.
        """
        if self.find_layer(name) is None:
            return 1.0
        if self.operator == "identity" and name.split(".")[-2] not in OUTPUTS:
            return 1.0
        return 1 / self.residual_ratio
