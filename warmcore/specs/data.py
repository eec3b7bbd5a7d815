"""Where text comes from and how it becomes tokens (torch-free)."""

from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from warmcore.specs.fields import Spec, VocabSize

BYTE_VOCAB_SIZE = 256
# 256 bytes and the end of a document; the upper one is four times what the largest models have.
MIN_BPE_VOCAB_SIZE, MAX_BPE_VOCAB_SIZE = BYTE_VOCAB_SIZE + 1, 2**20


class DataSpec(Spec):
    """Where text comes from and how it becomes tokens.

    `source` is `stdlib`, a file, a folder, a glob or `hf:` and a data set; what a file is goes by
    its extension (`warmcore.corpus.sources.KINDS`). `hash`, where given, is of the split's content:
    a corpus that has another is refused, so that the runs of a study are comparable;
    `tokenizer_hash` is the same for a tokenizer.json.
    """

    source: str = Field(min_length=1, max_length=4096)
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


def _vocab_size(tokenizer: str) -> int | None:
    """What the name of a tokenizer says by itself."""
    if tokenizer == "byte":
        return BYTE_VOCAB_SIZE
    return int(tokenizer.removeprefix("bpe:")) if tokenizer.startswith("bpe:") else None
