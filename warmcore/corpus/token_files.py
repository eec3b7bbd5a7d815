"""Files that hold tokens already: `.npy` and `.bin`, read in place and never copied.

`.npy` is NumPy's format, with a single dimension of uint16 or uint32. `.bin` has no header, only
little-endian ids in the dtype that the spec declares. These files have no documents. The split
therefore divides blocks of a fixed number of tokens by the hash of their content. No window of a
batch reaches from a block of training into a block of validation.
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
from warmcore.corpus.sources import SourceFile
from warmcore.specs.data import DataSpec
from warmcore.specs.fields import FieldError
from warmcore.specs.sources import BpeTokens, ByteTokens

Ids = NDArray[np.uint16] | NDArray[np.uint32]
DTYPES = ("uint16", "uint32")
# About 8 blocks for validation, as for text. A block is read into memory, at most 4 MB of it.
BLOCKS_PER_SHARE = 8
MAX_BLOCK_TOKENS = 2**20


@dataclass(frozen=True, kw_only=True)
class TokenBlock(Document):
    """A block of a token file: `num_bytes` bytes from `offset`."""

    dtype: str

    @property
    def num_tokens(self) -> int:
        """Tokens of the block; no separator follows."""
        return self.num_bytes // np.dtype(self.dtype).itemsize

    @property
    def ids(self) -> Ids:
        """The tokens, memory-mapped."""
        return _map_file(self.path)[self.offset : self.offset + self.num_bytes].view(self.dtype)


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A token file: the offset of the first id, and the number of ids."""

    path: Path
    offset: int
    num_tokens: int
    dtype: str

    @classmethod
    def from_file(cls, file: SourceFile, spec: DataSpec) -> "Shard":
        """Read the header of a `.npy` file; take the dtype of a `.bin` file from the spec.

        Raises:
            ValueError: the content does not fit the extension.
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
        message = f"{file.path} has no header; set token_dtype to uint16 or uint32"
        raise FieldError("token_dtype", dtype, message)
    size = np.dtype(dtype).itemsize
    if file.num_bytes % size:
        raise ValueError(f"{file.path} has {file.num_bytes} bytes: no whole number of {dtype}")
    return Shard(path=file.path, offset=0, num_tokens=file.num_bytes // size, dtype=dtype)


def find_shards(files: Iterable[SourceFile], spec: DataSpec) -> list[Shard]:
    """Return the token files as shards, all of the same dtype.

    Raises:
        ValueError: a file is no token file, the dtypes differ, or the tokenizer makes no files.
    """
    if isinstance(spec.parsed_tokenizer, ByteTokens | BpeTokens):
        raise FieldError(
            "tokenizer",
            spec.tokenizer,
            f"source {spec.source} holds tokens that tokenizer {spec.tokenizer} did not make; "
            "tokenizer none and vocab_size, or the tokenizer.json that made them, would work",
        )
    shards = [Shard.from_file(file, spec) for file in files]
    dtypes = {shard.dtype: shard.path for shard in shards}
    if len(dtypes) > 1:
        found = " and ".join(f"{dtype} ({path})" for dtype, path in sorted(dtypes.items()))
        raise ValueError(f"source {spec.source} mixes {found}; give files of a single dtype")
    return shards


def inspect_token_files(spec: DataSpec, files: list[SourceFile], vocab_size: int) -> CorpusFacts:
    """Return the facts of token files; of a large corpus only the size is measured."""
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
    """Read and check every id, and divide the blocks by hash.

    Raises:
        ValueError: an id is beyond the vocabulary, or a side has fewer than context + 1 tokens.
    """
    share = spec.val_fraction * sum(shard.num_tokens for shard in shards)
    size = min(MAX_BLOCK_TOKENS, max(round(share / BLOCKS_PER_SHARE), spec.context + 1))
    identity = f"{shards[0].dtype} of {tokenizer.identify_tokenizer(spec)}"
    blocks = (block for shard in shards for block in _cut_blocks(shard, size, vocab_size, spec))
    return split_documents(drop_duplicates(blocks), spec, identity)


def _cut_blocks(shard: Shard, size: int, vocab_size: int, spec: DataSpec) -> Iterator[TokenBlock]:
    itemsize = np.dtype(shard.dtype).itemsize
    # Every id is read once here. A larger id would fail inside the embedding, hours later.
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
    """Blocks of files as a single array; only the requested ids are in memory."""

    blocks: tuple[TokenBlock, ...]

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, places: NDArray[np.int64]) -> Ids:
        """Copy the ids at `places`, of any shape."""
        # Blocks of 10, 20 and 5 tokens end at 10, 30 and 35. Place 12 is in the second block (the
        # first end above 12 is 30), at index 12 - (30 - 20) = 2 of it.
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


# A file stays mapped for all its blocks; a process may have 65 530 maps on Linux.
@lru_cache(maxsize=4096)
def _map_file(path: Path) -> NDArray[np.uint8]:
    return np.memmap(path, dtype=np.uint8, mode="r")


def dump_split(split: Split) -> str:
    """Return the split as JSON: the files of an unchanged listing are not read again."""
    sides = {"train": split.train, "val": split.val}
    fields = {
        name: [[str(b.path), b.offset, b.num_bytes, b.hash] for b in blocks]
        for name, blocks in sides.items()
    }
    dtypes = {block.dtype for block in split.train if isinstance(block, TokenBlock)}
    return json.dumps({"data_hash": split.data_hash, "dtype": dtypes.pop()} | fields)


def load_split(text: str) -> tuple[Segments, Segments, str]:
    """Return training side, validation side and data hash from the JSON of `dump_split`."""
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
