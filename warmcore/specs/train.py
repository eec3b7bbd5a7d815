"""The training of a model: optimizer, schedule, budget, evaluation (torch-free)."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from warmcore.specs.fields import (
    Fraction,
    InnerFraction,
    NonNegative,
    NonNegativeInt,
    OpenFraction,
    Positive,
    PositiveFraction,
    PositiveInt,
    Spec,
    TokenCount,
    TokensPerParam,
)

ScheduleName = Literal["wsd", "cosine", "constant", "rewarm"]
CooldownShape = Literal["linear", "1-sqrt"]
ClipRule = Literal["width_weighted", "plain"]
OptimizerName = Literal["adamw", "muon"]
Precision = Literal["float32", "bf16"]
Strategy = Literal["ddp", "fsdp"]
AverageName = Literal["ema", "swa"]


class TrainSpec(Spec):
    """Optimizer, schedule and budget; `num_tokens` overrides the budget in `tokens_per_param`."""

    batch_size: Annotated[int, Field(gt=0, le=2**20)] = Field(
        default=16, description="sequences of `context` tokens per step"
    )
    tokens_per_param: TokensPerParam = 20.0
    num_tokens: TokenCount | None = None
    optimizer: OptimizerName = Field(
        default="adamw",
        description="muon: for hidden matrices; all other parameters stay with adamw",
    )
    lr: Positive = 0.012
    muon_lr_ratio: Positive = Field(
        default=1.0, description="lr of hidden matrices over lr; at 1 an update has AdamW's RMS"
    )
    muon_momentum: OpenFraction = 0.95
    weight_decay: NonNegative = 0.1
    beta1: OpenFraction = 0.9
    beta2: OpenFraction = 0.95
    eps: Positive = 1e-8
    grad_clip: Positive | None = 1.0
    clip: ClipRule = "width_weighted"
    schedule: ScheduleName = "wsd"
    warmup_fraction: OpenFraction = Field(default=0.01, description="unless `warmup_steps` is set")
    warmup_steps: NonNegativeInt | None = None
    cooldown_fraction: Fraction = 0.2
    cooldown: CooldownShape = "1-sqrt"
    lr_floor: OpenFraction = Field(
        default=0.1, description="rewarm: lr over the peak, at the start and at the end"
    )
    precision: Precision = Field(
        default="float32", description="of matrix products; weights and optimizer stay float32"
    )
    compile: bool = Field(default=False, description="torch.compile of the training step's loss")
    accumulate: PositiveInt = Field(
        default=1,
        description="equal parts of a batch; their gradients are added up: less memory, more time",
    )
    activation_checkpointing: bool = Field(
        default=False,
        description="blocks are computed again in the backward pass: less memory, more time",
    )
    ema_half_life: InnerFraction | None = Field(
        default=None,
        description="moving average of the weights, half of it from this last share of the past "
        "steps, e.g. 0.05; costs 4 bytes per parameter and a second evaluation",
    )
    swa_fraction: PositiveFraction | None = Field(
        default=None,
        description="equal average of the weights over this last share of the run; costs the same",
    )
    evaluations: Annotated[int, Field(gt=0, le=10_000)] = Field(
        default=8, description="evenly spaced, the last one at the end"
    )
    eval_tokens: TokenCount = Field(default=65_536, description="of the fixed validation set")
    log_every: TokenCount = Field(default=10, description="steps per measurement")

    @model_validator(mode="after")
    def _check_phases(self) -> Self:
        if self.warmup_steps is None and self.warmup_fraction + self.cooldown_fraction > 1:
            raise ValueError(
                f"warmup_fraction {self.warmup_fraction} + cooldown_fraction "
                f"{self.cooldown_fraction} exceed 1; lower one of them"
            )
        # Without a warmup, rewarm would begin at the peak.
        rises = self.warmup_fraction if self.warmup_steps is None else self.warmup_steps
        if self.schedule == "rewarm" and not rises:
            raise ValueError("schedule rewarm needs a warmup; warmup_fraction 0.01 works")
        if (
            self.schedule != "rewarm"
            and self.lr_floor != type(self).model_fields["lr_floor"].default
        ):
            raise ValueError(
                f"lr_floor {self.lr_floor:g} does nothing with schedule {self.schedule}; "
                "set schedule rewarm"
            )
        return self

    @model_validator(mode="after")
    def _check_accumulate(self) -> Self:
        """Refuse unequal parts: the mean of their means would not be the mean of the batch."""
        if self.batch_size % self.accumulate:
            below = self.batch_size // self.accumulate * self.accumulate
            works = " or ".join(str(n) for n in (below, below + self.accumulate) if n)
            raise ValueError(
                f"batch_size {self.batch_size} is no multiple of accumulate {self.accumulate}; "
                f"batch_size {works} would work"
            )
        return self

    @model_validator(mode="after")
    def _check_muon_fields(self) -> Self:
        # A value that has no effect is probably a mistake: say it now, and not after the run.
        for name in ("muon_lr_ratio", "muon_momentum"):
            value, default = getattr(self, name), type(self).model_fields[name].default
            if self.optimizer != "muon" and value != default:
                raise ValueError(
                    f"{name} {value:g} does nothing with optimizer {self.optimizer}; "
                    "set optimizer muon"
                )
        return self


def check_parallel_training(train: TrainSpec, processes: int, strategy: Strategy) -> None:
    """Raise ValueError unless the processes can share the batches and the optimizer's work."""
    if processes == 1:
        return
    # Each process computes an equal number of rows in each part: 4 processes with accumulate 2 need
    # a multiple of 8.
    unit = processes * train.accumulate
    if train.batch_size % unit:
        below = train.batch_size // unit * unit
        works = " or ".join(str(n) for n in (below, below + unit) if n)
        parts = f" x accumulate {train.accumulate}" if train.accumulate > 1 else ""
        raise ValueError(
            f"batch_size {train.batch_size} is no multiple of {processes} processes{parts}; "
            f"{works} would work"
        )
    if train.compile:
        raise ValueError(
            f"compile true is for a single process, not {processes}; set compile to false"
        )
    if strategy == "fsdp" and train.optimizer == "muon":
        raise ValueError(
            "optimizer muon needs whole matrices, and strategy fsdp shards them; "
            "strategy ddp would work, or optimizer adamw"
        )
