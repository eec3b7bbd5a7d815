"""Frozen specs of a run, shared by the API, the YAML files of the CLI and the workers.

Nothing here loads torch. Every spec rejects unknown keys and names the bad field. Modules outside
this package import these names from here; modules inside import from each other.
"""

from warmcore.specs.data import DataSpec
from warmcore.specs.fields import (
    FieldError,
    NonNegativeInt,
    Positive,
    PositiveInt,
    Seed,
    Spec,
    TokensPerParam,
    derive_seed,
)
from warmcore.specs.growth import (
    BaseWeights,
    CheckpointRef,
    CopyingOperator,
    DepthOperator,
    GrowthOptions,
    GrowthSpec,
)
from warmcore.specs.model import ModelSpec, Parametrization
from warmcore.specs.run import RunSpec
from warmcore.specs.sources import BYTE_VOCAB_SIZE
from warmcore.specs.train import (
    AverageName,
    ClipRule,
    CooldownShape,
    OptimizerName,
    Precision,
    ScheduleName,
    Strategy,
    TrainSpec,
)
from warmcore.specs.tunable import NOT_TRANSFERABLE, TUNABLE_PARAMS, WHOLE_PARAMS

__all__ = [
    "BYTE_VOCAB_SIZE",
    "NOT_TRANSFERABLE",
    "TUNABLE_PARAMS",
    "WHOLE_PARAMS",
    "AverageName",
    "BaseWeights",
    "CheckpointRef",
    "ClipRule",
    "CooldownShape",
    "CopyingOperator",
    "DataSpec",
    "DepthOperator",
    "FieldError",
    "GrowthOptions",
    "GrowthSpec",
    "ModelSpec",
    "NonNegativeInt",
    "OptimizerName",
    "Parametrization",
    "Positive",
    "PositiveInt",
    "Precision",
    "RunSpec",
    "ScheduleName",
    "Seed",
    "Spec",
    "Strategy",
    "TokensPerParam",
    "TrainSpec",
    "derive_seed",
]
