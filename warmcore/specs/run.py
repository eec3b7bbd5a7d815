"""What a run is made of: frozen specs, shared by the API, the CLI's YAML and the workers.

Nothing here loads torch. Every spec refuses unknown keys and names the field that is wrong. This
module is the whole; its parts are in `model_spec`, `data_spec`, `train_spec` and `growth_spec`.
"""

from typing import Annotated, Any, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from warmcore.data_spec import BYTE_VOCAB_SIZE, DataError, DataSpec
from warmcore.fields import (
    NonNegativeInt,
    Positive,
    PositiveInt,
    Seed,
    Spec,
    TokensPerParam,
    derived_seed,
)
from warmcore.growth_spec import (
    BaseWeights,
    CheckpointRef,
    CopyingOperator,
    DepthOperator,
    GrowthOptions,
    GrowthSpec,
)
from warmcore.model_spec import ModelSpec, Parametrization
from warmcore.train_spec import (
    AverageName,
    ClipRule,
    CooldownShape,
    OptimizerName,
    Precision,
    ScheduleName,
    Strategy,
    TrainSpec,
)

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
    "DataError",
    "DataSpec",
    "DepthOperator",
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
    "derived_seed",
]

_MODEL_PARAMS = frozenset(
    {
        "init_std",
        "embedding_std",
        "embedding_multiplier",
        "output_multiplier",
        "attention_multiplier",
    }
)
_TRAIN_PARAMS = frozenset(
    {
        "lr",
        "muon_lr_ratio",
        "muon_momentum",
        "weight_decay",
        "beta1",
        "beta2",
        "eps",
        "grad_clip",
        "warmup_fraction",
        "cooldown_fraction",
        "batch_size",
    }
)
TUNABLE_PARAMS = _MODEL_PARAMS | _TRAIN_PARAMS
WHOLE_PARAMS = frozenset({"batch_size"})
# METHOD §2: these do not carry over from a proxy to a wider target, or only mostly.
NOT_TRANSFERABLE = {
    "batch_size": "the best batch size changes with model and data size",
    "weight_decay": "weight decay transfers as lr x weight_decay, and only mostly",
}


class RunSpec(Spec):
    """One training run, complete: the same spec gives the same curve, bit for bit on CPU.

    With `branches` it is a trunk: it trains the phases that runs of these budgets have in common,
    up to where the last of them cools down. With `trunk` it is one of those runs and goes on from
    the trunk's checkpoint (`warmcore.branching`).
    """

    model: ModelSpec
    data: DataSpec
    train: TrainSpec = TrainSpec()
    growth: GrowthSpec | None = None
    seed: Seed = 0
    trunk: CheckpointRef | None = Field(
        default=None, description="the run so far: a trunk's checkpoint where this cools down"
    )
    branches: Annotated[tuple[TokensPerParam, ...], Field(max_length=16)] = Field(
        default=(), description="budgets, ascending, in place of train.tokens_per_param"
    )

    @field_validator("branches")
    @classmethod
    def _branches_fit(cls, branches: tuple[float, ...], info: ValidationInfo) -> tuple[float, ...]:
        """What is wrong elsewhere is told there: without those fields nothing is checked here."""
        if branches and {"model", "data", "train", "trunk"} <= info.data.keys():
            from warmcore.branching import check_branches  # noqa: PLC0415 - it imports these specs

            check_branches(cls.model_construct(**info.data, branches=branches))
        return branches

    @model_validator(mode="after")
    def _phases_fit(self) -> Self:
        from warmcore.branching import check_phases  # noqa: PLC0415 - it imports these specs

        check_phases(self)
        return self

    @property
    def start_checkpoint(self) -> CheckpointRef | None:
        """What the run starts from: its trunk, else the base that it grows from, else nothing."""
        return self.trunk or (self.growth.base if self.growth else None)

    @model_validator(mode="after")
    def _vocabularies_agree(self) -> Self:
        # Frozen for others; `model` is whole only when `data` is known.
        object.__setattr__(self, "model", self.model.for_data(self.data))
        return self

    def with_data(self, data: DataSpec) -> "RunSpec":
        """This run on `data`; its model takes that vocabulary unless it was given one."""
        return self.model_copy(update={"data": data, "model": self.model.for_data(data)})

    def with_params(self, params: dict[str, Any]) -> "RunSpec":
        """Return this spec with tuned hyperparameters put where they belong.

        Raises:
            ValueError: a name that is not tunable, or a value its field refuses.
        """
        unknown = sorted(set(params) - TUNABLE_PARAMS)
        if unknown:
            raise ValueError(
                f"{unknown[0]} is not tunable; one of {', '.join(sorted(TUNABLE_PARAMS))}"
            )
        model = {k: v for k, v in params.items() if k in _MODEL_PARAMS}
        train = {k: v for k, v in params.items() if k in _TRAIN_PARAMS}
        tuned = {
            "model": ModelSpec.model_validate(self.model.model_dump(exclude_unset=True) | model),
            "train": TrainSpec.model_validate(self.train.model_dump() | train),
        }
        return RunSpec.model_validate(dict(self) | tuned)
