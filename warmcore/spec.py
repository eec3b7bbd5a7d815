"""What a run is made of: frozen specs, shared by the API, the CLI's YAML and the workers.

Nothing here loads torch. Every spec refuses unknown keys and names the field that is wrong.
"""

import hashlib
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

if TYPE_CHECKING:
    from collections.abc import Iterator

    from warmcore.corpus import CorpusFacts

BYTE_VOCAB_SIZE = 256
# 256 bytes and the end of a document; the upper one is four times what the largest models have.
MIN_BPE_VOCAB_SIZE, MAX_BPE_VOCAB_SIZE = BYTE_VOCAB_SIZE + 1, 2**20

Parametrization = Literal["mup", "standard"]
ScheduleName = Literal["wsd", "cosine", "constant", "rewarm"]
CooldownShape = Literal["linear", "1-sqrt"]
ClipRule = Literal["width_weighted", "plain"]
OptimizerName = Literal["adamw", "muon"]
Precision = Literal["float32", "bf16"]
Strategy = Literal["ddp", "fsdp"]
AverageName = Literal["ema", "swa"]
BaseWeights = Literal["raw"] | AverageName
PaddingOperator = Literal["shrink_perturb", "slice", "zero_pad"]
CopyingOperator = Literal["clone", "hyperclone", "net2net"]
WidthOperator = PaddingOperator | CopyingOperator
DepthOperator = Literal["stack", "interleave", "identity"]
OptimizerStateRule = Literal["reset", "transfer", "transfer_old_reset_new"]

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
OpenFraction = Annotated[float, Field(ge=0, lt=1)]
PositiveFraction = Annotated[float, Field(gt=0, le=1)]
InnerFraction = Annotated[float, Field(gt=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
# Bounds far beyond any model, so that every size that follows from them can be computed and stored.
Width = Annotated[int, Field(gt=0, le=2**20)]
Depth = Annotated[int, Field(gt=0, le=10_000)]
VocabSize = Annotated[int, Field(gt=0, le=2**24)]
TokenCount = Annotated[int, Field(gt=0, le=10**15)]
TokensPerParam = Annotated[float, Field(gt=0, le=1e6)]


def derived_seed(*parts: object) -> int:
    """A seed in [0, 2^63) that depends on every part and on nothing else."""
    digest = hashlib.sha256(" ".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class Spec(BaseModel):
    """Frozen, keyword-only, and strict about unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelSpec(Spec):
    """A Llama-style decoder. All widths are in units of features, depth in blocks.

    `base_width` and `base_depth` are where every muP factor is 1 (METHOD: the same for all models
    of one study); None means the model's own, so a lone model equals its standard twin.
    """

    width: Width
    depth: Depth
    head_dim: Annotated[int, Field(gt=0, le=4096)] = 64
    group_size: Annotated[int, Field(gt=0, le=4096)] = Field(
        default=1, description="query heads per key/value head"
    )
    ffn_ratio: Annotated[float, Field(gt=0, le=64)] = Field(
        default=3.0, description="feed-forward width over width"
    )
    vocab_size: VocabSize = Field(
        default=BYTE_VOCAB_SIZE,
        description="where it is not given, the tokenizer's; a larger one pads the embedding",
    )
    base_width: Width | None = None
    base_depth: Depth | None = None
    parametrization: Parametrization = "mup"
    init_std: Positive = Field(default=0.08, description="of hidden matrices, at the base width")
    embedding_std: Positive = 0.5
    unembedding_std: NonNegative = 0.0
    embedding_multiplier: Positive = 1.0
    output_multiplier: Positive = 1.0
    attention_multiplier: Positive = 1.0
    rope_theta: Positive = 10_000.0
    norm_eps: Positive = 1e-5

    @model_validator(mode="after")
    def _shapes_fit(self) -> Self:
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} must be even: RoPE rotates pairs")
        block = self.head_dim * self.group_size
        for name in ("width", "base_width"):
            width = getattr(self, name)
            if width is not None and width % block:
                below, above = width // block * block, (width // block + 1) * block
                works = f"{below} or {above}" if below else str(above)
                raise ValueError(
                    f"{name} {width} is not a multiple of {block} "
                    f"(head_dim {self.head_dim} x group_size {self.group_size}); {works} would work"
                )
        ffn = self.ffn_ratio * self.width
        if abs(ffn - round(ffn)) > 1e-6 * ffn or round(ffn) < 1:
            raise ValueError(
                f"ffn_ratio {self.ffn_ratio} x width {self.width} = {ffn} is no integer"
            )
        return self

    def for_data(self, data: "DataSpec") -> "ModelSpec":
        """This model with the vocabulary of `data`, unless it has one of its own.

        Raises:
            ValueError: its own is too small for the tokenizer's ids.
        """
        size = data.known_vocab_size
        if size is None:
            return self
        if "vocab_size" not in self.model_fields_set:
            return self.model_copy(update={"vocab_size": size})
        if self.vocab_size < size:
            raise ValueError(
                f"vocab_size {self.vocab_size} is smaller than the {size} of tokenizer "
                f"{data.tokenizer}; leave it out, or {size} or more would work"
            )
        return self

    @property
    def num_heads(self) -> int:
        """Query heads."""
        return self.width // self.head_dim

    @property
    def num_kv_heads(self) -> int:
        """Key/value heads."""
        return self.num_heads // self.group_size

    @property
    def kv_width(self) -> int:
        """Features of all key (or value) heads together."""
        return self.num_kv_heads * self.head_dim

    @property
    def ffn_width(self) -> int:
        """Features inside the feed-forward block."""
        return round(self.ffn_ratio * self.width)

    @property
    def width_multiplier(self) -> float:
        """M = n / n0 (METHOD §2); 1 for standard parametrization."""
        if self.parametrization == "standard" or self.base_width is None:
            return 1.0
        return self.width / self.base_width

    @property
    def depth_multiplier(self) -> float:
        """L / L0 (METHOD §2); 1 for standard parametrization."""
        if self.parametrization == "standard" or self.base_depth is None:
            return 1.0
        return self.depth / self.base_depth


class DataError(ValueError):
    """What is wrong with the data itself; `field` is the DataSpec's field to change."""

    def __init__(self, field: str, message: str) -> None:
        self.field = field
        super().__init__(message)


class DataSpec(Spec):
    """Where text comes from and how it becomes tokens.

    `source` is `stdlib`, a file, a folder, a glob or `hf:` and a data set; what a file is goes by
    its extension (`warmcore.listing.KINDS`). `hash`, where given, is of the split's content: a
    corpus that has another is refused, so that the runs of a study are comparable;
    `tokenizer_hash` is the same for a tokenizer.json.
    """

    source: str = Field(min_length=1)
    tokenizer: str = Field(
        default="byte",
        description="byte, bpe:N, a tokenizer.json, or none for token files of `vocab_size` ids",
    )
    context: Annotated[int, Field(ge=2, le=1_048_576)] = 128
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05
    hash: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    tokenizer_hash: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    vocab_size: VocabSize | None = Field(
        default=None,
        validate_default=True,
        description="to be given with tokenizer none",
    )
    token_dtype: Literal["uint16", "uint32"] | None = Field(
        default=None, description="of .bin files, which have no header; little-endian"
    )
    text_field: str = Field(default="text", min_length=1, description="of JSONL, Parquet and hf:")

    @field_validator("tokenizer")
    @classmethod
    def _is_a_tokenizer(cls, name: str) -> str:
        if name in ("byte", "none") or name.endswith(".json"):
            return name
        kind, _, size = name.partition(":")
        if kind != "bpe" or not size.isdecimal() or not size.isascii():
            works = "byte, bpe:4096 (any size), the path of a tokenizer.json, or none"
            raise ValueError(f"{name!r} is no tokenizer; {works} would work")
        if len(size) > len(str(MAX_BPE_VOCAB_SIZE)) or not (
            MIN_BPE_VOCAB_SIZE <= int(size) <= MAX_BPE_VOCAB_SIZE
        ):
            bounds = f"bpe:{MIN_BPE_VOCAB_SIZE} to bpe:{MAX_BPE_VOCAB_SIZE}"
            raise ValueError(f"{name!r} is out of bounds; {bounds} would work")
        return f"bpe:{int(size)}"

    @field_validator("vocab_size")
    @classmethod
    def _is_the_tokenizers(cls, size: int | None, info: ValidationInfo) -> int | None:
        name = info.data.get("tokenizer", "")
        if name == "none" and size is None:
            raise ValueError("tokenizer none says nothing of the ids; give how many there are")
        known = _vocab_size(name)
        if None not in (size, known) and size != known:
            raise ValueError(f"{size} is not the {known} of tokenizer {name}; leave it out")
        return size

    @property
    def known_vocab_size(self) -> int | None:
        """Ids of the tokenizer; None for a tokenizer.json that nobody has looked into yet."""
        return _vocab_size(self.tokenizer) or self.vocab_size

    def inspect(self) -> "CorpusFacts":
        """Look at the corpus itself: its size and, when it is small enough to read, its split.

        Raises:
            ValueError: nothing to read at `source`, or too little for one context of each split.
        """
        from warmcore.inspection import inspect  # noqa: PLC0415 - specs alone touch no files

        return inspect(self)


def _vocab_size(tokenizer: str) -> int | None:
    """What the name of a tokenizer says by itself."""
    if tokenizer == "byte":
        return BYTE_VOCAB_SIZE
    return int(tokenizer.removeprefix("bpe:")) if tokenizer.startswith("bpe:") else None


class TrainSpec(Spec):
    """Optimizer, schedule and budget: `tokens_per_param`, unless `num_tokens` is set."""

    batch_size: Annotated[int, Field(gt=0, le=2**20)] = Field(
        default=16, description="sequences of `context` tokens per step"
    )
    tokens_per_param: TokensPerParam = 20.0
    num_tokens: TokenCount | None = None
    optimizer: OptimizerName = Field(
        default="adamw", description="muon: of hidden matrices; all else stays with adamw"
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
        default=0.1, description="rewarm: over the peak, where lr rises from and decays to"
    )
    precision: Precision = Field(
        default="float32", description="of matrix products; weights and optimizer stay float32"
    )
    compile: bool = Field(default=False, description="torch.compile of the training step's loss")
    accumulate: PositiveInt = Field(
        default=1, description="parts of a batch whose gradients are added up: memory for time"
    )
    activation_checkpointing: bool = Field(
        default=False, description="blocks are computed again in the backward pass: likewise"
    )
    ema_half_life: InnerFraction | None = Field(
        default=None,
        description="average of the weights, half of it of this last share of the steps so far, "
        "e.g. 0.05; 4 bytes per parameter and an evaluation of its own",
    )
    swa_fraction: PositiveFraction | None = Field(
        default=None,
        description="equal average of the weights over this last share of the run; likewise",
    )
    evaluations: Annotated[int, Field(gt=0, le=10_000)] = Field(
        default=8, description="evenly spaced, the last one at the end"
    )
    eval_tokens: TokenCount = Field(default=65_536, description="of the fixed validation set")
    log_every: TokenCount = Field(default=10, description="steps per measurement")

    @model_validator(mode="after")
    def _phases_fit(self) -> Self:
        if self.warmup_steps is None and self.warmup_fraction + self.cooldown_fraction > 1:
            raise ValueError(
                f"warmup_fraction {self.warmup_fraction} + cooldown_fraction "
                f"{self.cooldown_fraction} exceed 1; lower one of them"
            )
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
    def _parts_are_equal(self) -> Self:
        """So that the mean of the parts' means is the batch's mean."""
        if self.batch_size % self.accumulate:
            below = self.batch_size // self.accumulate * self.accumulate
            works = " or ".join(str(n) for n in (below, below + self.accumulate) if n)
            raise ValueError(
                f"batch_size {self.batch_size} is no multiple of accumulate {self.accumulate}; "
                f"batch_size {works} would work"
            )
        return self

    @model_validator(mode="after")
    def _muon_is_asked_for(self) -> Self:
        for name in ("muon_lr_ratio", "muon_momentum"):
            value, default = getattr(self, name), type(self).model_fields[name].default
            if self.optimizer != "muon" and value != default:
                raise ValueError(
                    f"{name} {value:g} does nothing with optimizer {self.optimizer}; "
                    "set optimizer muon"
                )
        return self


class CheckpointRef(Spec):
    """A checkpoint by place and content: `hash` is the SHA-256 of its manifest."""

    uri: str = Field(min_length=1)
    hash: str = Field(pattern=r"^[0-9a-f]{64}$")


class GrowthOptions(Spec):
    """How a base checkpoint becomes the target's initial weights (METHOD §3)."""

    operator: WidthOperator = Field(default="shrink_perturb", description="in width")
    depth_operator: DepthOperator | None = Field(
        default="stack", description="None refuses a target of another depth"
    )
    shrink: Fraction = Field(default=0.4, description="shrink_perturb and slice: of base weights")
    perturb: NonNegative = Field(
        default=1.0,
        description="shrink_perturb: std of noise over init std; slice: not in the padding",
    )
    noise: NonNegative = Field(
        default=0.0,
        description="clone: std of noise over init std; hyperclone and net2net: of noise that "
        "cancels over copies and so keeps the function",
    )
    optimizer_state: OptimizerStateRule = "reset"
    base_weights: BaseWeights = Field(
        default="raw", description="the base's last weights, or an average that its run kept"
    )

    @property
    def copying_operator(self) -> CopyingOperator | None:
        """The operator if it repeats units, None if it appends new ones."""
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

    def check(self, base: ModelSpec, target: ModelSpec) -> None:
        """Raise ValueError unless these operators can grow `base` into `target`."""
        from warmcore.admission import check  # noqa: PLC0415 - it imports these specs

        check(self, base, target)

    def check_depth(self, base: ModelSpec, target: ModelSpec) -> None:
        """The part of `check` that is about depth."""
        from warmcore.admission import check_depth  # noqa: PLC0415 - it imports these specs

        check_depth(self, base, target)

    def check_optimizers(self, base: TrainSpec, target: TrainSpec) -> None:
        """Raise ValueError where the base's optimizer leaves no state that the target's can use."""
        from warmcore.admission import check_optimizers  # noqa: PLC0415 - it imports these specs

        check_optimizers(self, base, target)

    def check_base_weights(self, base: TrainSpec) -> None:
        """Raise ValueError unless a base that was trained so has the weights to grow."""
        from warmcore.admission import check_base_weights  # noqa: PLC0415 - it imports these specs

        check_base_weights(self, base)

    def warnings(self, base: ModelSpec, target: ModelSpec) -> "Iterator[str]":
        """What a user should know before growing `base` into `target` this way."""
        from warmcore.admission import warnings  # noqa: PLC0415 - it imports these specs

        return warnings(self, base, target)


class GrowthSpec(GrowthOptions):
    """Growth options together with the checkpoint that growth starts from."""

    base: CheckpointRef


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
