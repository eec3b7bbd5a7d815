"""Sources of text and tokenizers, parsed from their names in a spec (torch-free).

`DataSpec` keeps both as the strings that users write. Code that has to tell the cases apart matches
on the classes here and takes no string apart.
"""

from dataclasses import dataclass
from pathlib import Path

BYTE_VOCAB_SIZE = 256
# 256 bytes and the end of a document; the largest models have a quarter of the upper bound.
MIN_BPE_VOCAB_SIZE, MAX_BPE_VOCAB_SIZE = BYTE_VOCAB_SIZE + 1, 2**20
HUB_PREFIX = "hf:"
_BYTE, _NONE, _BPE, _STDLIB = "byte", "none", "bpe", "stdlib"


@dataclass(frozen=True)
class ByteTokens:
    """`byte`: tokens are the bytes of the text."""


@dataclass(frozen=True)
class BpeTokens:
    """`bpe:N`: a byte-level BPE of `vocab_size` ids, trained on the corpus itself."""

    vocab_size: int


@dataclass(frozen=True)
class TokenizerFile:
    """A tokenizer.json at `path`, which may begin with `~`."""

    path: Path


@dataclass(frozen=True)
class NoTokenizer:
    """`none`: the source holds token ids already."""


ParsedTokenizer = ByteTokens | BpeTokens | TokenizerFile | NoTokenizer


def parse_tokenizer(name: str) -> ParsedTokenizer:
    """Return the tokenizer that `name` stands for.

    Raises:
        ValueError: it stands for none, with the names that would work.
    """
    if name == _BYTE:
        return ByteTokens()
    if name == _NONE:
        return NoTokenizer()
    if name.endswith(".json"):
        return TokenizerFile(Path(name))
    return BpeTokens(_parse_bpe_size(name))


def _parse_bpe_size(name: str) -> int:
    kind, _, size = name.partition(":")
    # `isdecimal` alone accepts the digits of other scripts.
    if kind != _BPE or not size.isdecimal() or not size.isascii():
        works = "byte, bpe:4096 (any size), the path of a tokenizer.json, or none"
        raise ValueError(f"{name!r} is no tokenizer; {works} would work")
    # Compare lengths first: `int` refuses to convert a string of more than 4300 digits.
    if len(size) > len(str(MAX_BPE_VOCAB_SIZE)) or not (
        MIN_BPE_VOCAB_SIZE <= int(size) <= MAX_BPE_VOCAB_SIZE
    ):
        bounds = f"bpe:{MIN_BPE_VOCAB_SIZE} to bpe:{MAX_BPE_VOCAB_SIZE}"
        raise ValueError(f"{name!r} is out of bounds; {bounds} would work")
    return int(size)


@dataclass(frozen=True)
class StandardLibrary:
    """`stdlib`: the Python files of the standard library."""


@dataclass(frozen=True)
class Files:
    """A file, a folder or a glob pattern, as given; it may begin with `~`."""

    pattern: str


@dataclass(frozen=True)
class HubDataset:
    """`hf:NAME` or `hf:NAME:CONFIG`: a data set in the local cache of `datasets`."""

    name: str


@dataclass(frozen=True)
class SavedDataset:
    """`hf:./folder`: a folder that `Dataset.save_to_disk` wrote."""

    path: Path


ParsedSource = StandardLibrary | Files | HubDataset | SavedDataset


def parse_source(source: str) -> ParsedSource:
    """Return the source that the string stands for; every string stands for a source."""
    if source == _STDLIB:
        return StandardLibrary()
    if not source.startswith(HUB_PREFIX):
        return Files(source)
    name = source.removeprefix(HUB_PREFIX)
    # As in a shell, a name that begins like this is a path. No data set has such a name.
    return SavedDataset(Path(name)) if name.startswith((".", "/", "~")) else HubDataset(name)
