"""Options of growth: from a base checkpoint to a target's initial weights (torch-free)."""

from typing import Literal

from pydantic import Field

from warmcore.specs.fields import Fraction, NonNegative, Spec
from warmcore.specs.train import AverageName

BaseWeights = Literal["raw"] | AverageName
# Padding operators append new units to the base's; copying operators repeat the base's units.
PaddingOperator = Literal["shrink_perturb", "slice", "zero_pad"]
CopyingOperator = Literal["clone", "hyperclone", "net2net"]
WidthOperator = PaddingOperator | CopyingOperator
DepthOperator = Literal["stack", "interleave", "identity"]
OptimizerStateRule = Literal["reset", "transfer", "transfer_old_reset_new"]


class CheckpointRef(Spec):
    """A checkpoint by place and content: `hash` is the SHA-256 of the manifest."""

    uri: str = Field(min_length=1)
    hash: str = Field(pattern=r"^[0-9a-f]{64}$")


class GrowthOptions(Spec):
    """Rules that turn a base checkpoint into the target's initial weights (METHOD §3)."""

    operator: WidthOperator = Field(default="shrink_perturb", description="in width")
    depth_operator: DepthOperator | None = Field(
        default="stack", description="None refuses a target of another depth"
    )
    shrink: Fraction = Field(
        default=0.4, description="shrink_perturb and slice: factor of the base's weights"
    )
    perturb: NonNegative = Field(
        default=1.0,
        description="shrink_perturb and slice: std of noise over init std; none in slice's padding",
    )
    noise: NonNegative = Field(
        default=0.0,
        description="clone: std of noise over init std; hyperclone and net2net: likewise, of noise "
        "that cancels over copies and keeps the function",
    )
    optimizer_state: OptimizerStateRule = "reset"
    base_weights: BaseWeights = Field(
        default="raw", description="the base's last weights, or an average that its run kept"
    )

    @property
    def copying_operator(self) -> CopyingOperator | None:
        """The operator if it repeats units; None if it appends new units."""
        match self.operator:
            case "clone" | "hyperclone" | "net2net":
                return self.operator
            case "shrink_perturb" | "slice" | "zero_pad":
                return None

    @property
    def noise_scale(self) -> float:
        """Std of the noise that is added, over the target's initial std."""
        match self.operator:
            case "shrink_perturb" | "slice":
                return self.perturb
            case "clone" | "hyperclone" | "net2net":
                return self.noise
            case "zero_pad":
                return 0.0


class GrowthSpec(GrowthOptions):
    """Growth options together with the checkpoint that growth starts from."""

    base: CheckpointRef
