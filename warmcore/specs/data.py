"""The data of a run: a source of text and a tokenizer (torch-free)."""

from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from warmcore.specs.fields import Spec, VocabSize
from warmcore.specs.sources import (
    BYTE_VOCAB_SIZE,
    BpeTokens,
    ByteTokens,
    NoTokenizer,
    ParsedSource,
    ParsedTokenizer,
    parse_source,
    parse_tokenizer,
)


class DataSpec(Spec):
    """A source of text, and the tokenizer that turns the text into tokens.

    `source` is `stdlib`, a file, a folder, a glob, or `hf:` and a data set. The extension of a file
    decides how it is read (`warmcore.corpus.sources.KINDS`). `hash` pins the content of the
    split: preparing a corpus of another hash fails, so the runs of a study are comparable.
    `tokenizer_hash` pins a tokenizer.json in the same way.
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
        description="required with tokenizer none",
    )
    token_dtype: Literal["uint16", "uint32"] | None = Field(
        default=None, description="of .bin files, which have no header; little-endian"
    )
    text_field: str = Field(default="text", min_length=1, description="of JSONL, Parquet and hf:")

    @field_validator("tokenizer")
    @classmethod
    def _normalize_tokenizer(cls, name: str) -> str:
        tokenizer = parse_tokenizer(name)
        # "bpe:0400" is stored as "bpe:400": the data hash contains the string.
        return f"bpe:{tokenizer.vocab_size}" if isinstance(tokenizer, BpeTokens) else name

    @field_validator("vocab_size")
    @classmethod
    def _check_vocab_size(cls, size: int | None, info: ValidationInfo) -> int | None:
        if "tokenizer" not in info.data:  # pydantic already reports that field
            return size
        name = info.data["tokenizer"]
        tokenizer = parse_tokenizer(name)
        if isinstance(tokenizer, NoTokenizer) and size is None:
            raise ValueError("tokenizer none does not say how many ids there are; give vocab_size")
        known = _known_size(tokenizer)
        if None not in (size, known) and size != known:
            raise ValueError(f"{size} is not the {known} of tokenizer {name}; leave it out")
        return size

    @property
    def parsed_tokenizer(self) -> ParsedTokenizer:
        """`tokenizer` as a type."""
        return parse_tokenizer(self.tokenizer)

    @property
    def parsed_source(self) -> ParsedSource:
        """`source` as a type."""
        return parse_source(self.source)

    @property
    def known_vocab_size(self) -> int | None:
        """Number of ids; None for a tokenizer.json until an inspection has read the file."""
        return _known_size(self.parsed_tokenizer) or self.vocab_size


def _known_size(tokenizer: ParsedTokenizer) -> int | None:
    """Return the number of ids, if the tokenizer's name alone determines it."""
    if isinstance(tokenizer, ByteTokens):
        return BYTE_VOCAB_SIZE
    return tokenizer.vocab_size if isinstance(tokenizer, BpeTokens) else None
