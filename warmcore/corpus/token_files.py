"""Tokens that are there already: `.npy` and `.bin` files, read where they lie.

`.npy` is NumPy's format: one dimension, uint16 or uint32. `.bin` is the ids and nothing else: no
header, little-endian, in the dtype that the spec declares. Files have no documents, so the split is
by blocks of a fixed number of tokens, each known by the hash of its content: no window reaches from
one side into the other.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from warmcore.corpus import tokenizer
from warmcore.corpus.documents import Document, Split, drop_duplicates, split_documents
from warmcore.corpus.facts import MAX_INSPECTED_BYTES, CorpusFacts
from warmcore.corpus.source_files import SourceFile
from warmcore.specs.data import DataSpec
from warmcore.specs.fields import FieldError
from warmcore.specs.sources import BpeTokens, ByteTokens

Ids = NDArray[np.uint16] | NDArray[np.uint32]
DTYPES = ("uint16", "uint32")
# About 8 blocks make the validation share, as for text, up to a block that is read at once.
BLOCKS_PER_SHARE = 8
MAX_BLOCK_TOKENS = 2**20


@dataclass(frozen=True, kw_only=True)
class TokenBlock(Document):
    """Tokens of a file, `num_bytes` bytes of it from `offset`."""

    dtype: str

    @property
    def num_tokens(self) -> int:
        """Nothing separates blocks."""
        return self.num_bytes // np.dtype(self.dtype).itemsize

    @property
    def ids(self) -> Ids:
        """The tokens, in the file."""
        return _map_file(self.path)[self.offset : self.offset + self.num_bytes].view(self.dtype)


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Where the ids of a file begin, and how many there are."""

    path: Path
    offset: int
    num_tokens: int
    dtype: str

    @classmethod
    def from_file(cls, file: SourceFile, spec: DataSpec) -> "Shard":
        """Look at a file's header, or at what the spec declares.

        Raises:
            ValueError: it is not what its extension says.
        """
        return (
            _read_npy_header(file.path)
            if file.extension == ".npy"
            else _measure_bin(file, spec.token_dtype)
        )


def _read_npy_header(path: Path) -> Shard:
    try:
        with path.open("rb") as opened:
            version = np.lib.format.read_magic(opened)
            read = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }[version]
            shape, _, dtype = read(opened)
            offset = opened.tell()
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path} is no .npy file: {error}") from None
    if dtype.newbyteorder("=").name not in DTYPES or dtype.str[0] == ">" or len(shape) != 1:
        raise ValueError(
            f"{path} holds {dtype.str} of shape {shape}; one dimension of little-endian uint16 or "
            "uint32 would work"
        )
    if path.stat().st_size < offset + shape[0] * dtype.itemsize:
        raise ValueError(f"{path} ends before the {shape[0]} tokens that its header names")
    return Shard(path=path, offset=offset, num_tokens=shape[0], dtype=dtype.name)


def _measure_bin(file: SourceFile, dtype: str | None) -> Shard:
    if dtype is None:
        message = f"{file.path} has no header; token_dtype: uint16 or uint32 says what it is"
        raise FieldError("token_dtype", dtype, message)
    size = np.dtype(dtype).itemsize
    if file.num_bytes % size:
        raise ValueError(f"{file.path} has {file.num_bytes} bytes: no whole number of {dtype}")
    return Shard(path=file.path, offset=0, num_tokens=file.num_bytes // size, dtype=dtype)


def find_shards(files: Iterable[SourceFile], spec: DataSpec) -> list[Shard]:
    """Every shard; all have one dtype, and the spec says which ids they may hold.

    Raises:
        ValueError: a file that is no shard, or a tokenizer that can have made none.
    """
    if isinstance(spec.parsed_tokenizer, ByteTokens | BpeTokens):
        raise FieldError(
            "tokenizer",
            spec.tokenizer,
            f"source {spec.source} holds tokens, which tokenizer {spec.tokenizer} did not make; "
            "tokenizer none and vocab_size, or the tokenizer.json that made them, would work",
        )
    shards = [Shard.from_file(file, spec) for file in files]
    dtypes = {shard.dtype: shard.path for shard in shards}
    if len(dtypes) > 1:
        found = " and ".join(f"{dtype} ({path})" for dtype, path in sorted(dtypes.items()))
        raise ValueError(f"source {spec.source} mixes {found}; give the files of one dtype")
    return shards


def inspect_token_files(spec: DataSpec, files: list[SourceFile], vocab_size: int) -> CorpusFacts:
    """Facts of token files; a corpus too large to read is only measured."""
    shards = find_shards(files, spec)
    num_bytes = sum(file.num_bytes for file in files)
    if num_bytes > MAX_INSPECTED_BYTES:
        return CorpusFacts(num_documents=len(files), num_bytes=num_bytes)
    split = split_shards(shards, spec, vocab_size)
    return CorpusFacts(
        num_documents=len(split.train) + len(split.val),
        num_bytes=num_bytes,
        num_train_tokens=sum(block.num_tokens for block in split.train),
        num_val_tokens=sum(block.num_tokens for block in split.val),
        data_hash=split.data_hash,
    )


def split_shards(shards: list[Shard], spec: DataSpec, vocab_size: int) -> Split:
    """Read every id once, check it, and divide the blocks by hash.

    Raises:
        ValueError: an id beyond the vocabulary, or a side shorter than a context.
    """
    share = spec.val_fraction * sum(shard.num_tokens for shard in shards)
    size = min(MAX_BLOCK_TOKENS, max(round(share / BLOCKS_PER_SHARE), spec.context + 1))
    identity = f"{shards[0].dtype} of {tokenizer.identify_tokenizer(spec)}"
    blocks = (block for shard in shards for block in _cut_blocks(shard, size, vocab_size, spec))
    return split_documents(drop_duplicates(blocks), spec, identity)


def _cut_blocks(shard: Shard, size: int, vocab_size: int, spec: DataSpec) -> Iterator[TokenBlock]:
    itemsize = np.dtype(shard.dtype).itemsize
    ids = np.memmap(shard.path, dtype=shard.dtype, mode="r", offset=shard.offset)
    for start in range(0, shard.num_tokens, size):
        block = ids[start : min(start + size, shard.num_tokens)]
        if (largest := int(block.max())) >= vocab_size:
            place = start + int(block.argmax())
            raise FieldError(
                "vocab_size",
                spec.vocab_size,  # as given: None where a tokenizer.json has the number
                f"{shard.path} holds id {largest} at token {place}, beyond vocab_size "
                f"{vocab_size}; at least {largest + 1} would work",
            )
        yield TokenBlock(
            path=shard.path,
            offset=shard.offset + start * itemsize,
            num_bytes=len(block) * itemsize,
            hash=hashlib.sha256(block.tobytes()).hexdigest(),
            dtype=shard.dtype,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Segments:
    """Blocks of files end to end, as one array that is never in memory."""

    blocks: tuple[TokenBlock, ...]

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, places: NDArray[np.int64]) -> Ids:
        """Copy the ids at `places`, of any shape."""
        flat = places.ravel()
        owners = np.searchsorted(self._ends, flat, side="right")
        ids = np.empty(len(flat), dtype=self.blocks[0].dtype)
        for owner in np.unique(owners):
            block, mine = self.blocks[owner], owners == owner
            start = self._ends[owner] - block.num_tokens
            ids[mine] = block.ids[flat[mine] - start]
        return ids.reshape(places.shape)

    @cached_property
    def _ends(self) -> NDArray[np.int64]:
        return np.cumsum([block.num_tokens for block in self.blocks])


@lru_cache(maxsize=4096)
def _map_file(path: Path) -> NDArray[np.uint8]:
    return np.memmap(path, dtype=np.uint8, mode="r")


def dump_split(split: Split) -> str:
    """The split as JSON, so that an unchanged listing is not read again."""
    sides = {"train": split.train, "val": split.val}
    fields = {
        name: [[str(b.path), b.offset, b.num_bytes, b.hash] for b in blocks]
        for name, blocks in sides.items()
    }
    dtypes = {block.dtype for block in split.train if isinstance(block, TokenBlock)}
    return json.dumps({"data_hash": split.data_hash, "dtype": dtypes.pop()} | fields)


def load_split(text: str) -> tuple[Segments, Segments, str]:
    """Training, validation and data hash of what `dump` wrote."""
    fields: Any = json.loads(text)
    train, val = (
        Segments(
            blocks=tuple(
                TokenBlock(
                    path=Path(path), offset=offset, num_bytes=size, hash=h, dtype=fields["dtype"]
                )
                for path, offset, size, h in fields[name]
            )
        )
        for name in ("train", "val")
    )
    return train, val, fields["data_hash"]
