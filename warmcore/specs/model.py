"""The architecture of a model (torch-free)."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from warmcore.specs.data import DataSpec
from warmcore.specs.fields import Depth, NonNegative, Positive, Spec, VocabSize, Width
from warmcore.specs.sources import BYTE_VOCAB_SIZE

Parametrization = Literal["mup", "standard"]


class ModelSpec(Spec):
    """A Llama-style decoder. All widths are in units of features, depth in blocks.

    At `base_width` and `base_depth` every muP factor is 1 (METHOD: the same for all models of a
    study). None stands for the model's own sizes: without a base, muP equals the standard
    parametrization.
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
        description="by default the tokenizer's; a larger number pads the embedding",
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
    def _check_shapes(self) -> Self:
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} must be even: RoPE rotates pairs")
        # Example: head_dim 64 and group_size 4 give widths that are multiples of 256.
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
        # 2.6666667 x 768 is 2048.00003: a ratio with 7 digits is accepted.
        ffn = self.ffn_ratio * self.width
        if abs(ffn - round(ffn)) > 1e-6 * ffn or round(ffn) < 1:
            raise ValueError(
                f"ffn_ratio {self.ffn_ratio} x width {self.width} = {ffn} is no integer"
            )
        return self

    def for_data(self, data: DataSpec) -> "ModelSpec":
        """Return this model with the vocabulary of `data`, unless the user gave a vocabulary.

        Raises:
            ValueError: the given vocabulary is too small for the tokenizer's ids.
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
