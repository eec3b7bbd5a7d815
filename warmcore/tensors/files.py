"""Files of tensors in the safetensors format, written and read tensor by tensor.

The format is the length of a header (8 bytes, little-endian), the header (JSON: name to dtype,
shape and place) and the bytes of the tensors. The shapes therefore suffice to begin a file.

The library's own reader maps files into memory. Every touched page then counts as memory of this
process. `TensorFile` reads into a tensor instead.
"""

import hashlib
import json
import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import BufferedWriter
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from warmcore.storage.file_facts import FileFacts
from warmcore.tensors.row_blocks import BLOCK_ELEMENTS, fill_from_blocks

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Making, writing and hashing take turns at being slow; a few chunks in between keep all three busy.
# With the chunk in each thread, some 10 MB are in memory.
CHUNKS_AHEAD = 8
# Larger writes make the page cache use pages of 1 MB or 2 MB, and a virtual machine may have to get
# these from its host. 1.3 GB then took 0.3 to 2.8 s of system time, against 0.3 s.
WRITE_BYTES = 2**18


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """Dtype and shape of a tensor that need not exist yet."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of all elements."""
        return math.prod(self.shape) * self.dtype.itemsize


Layout = Mapping[str, TensorInfo]


@dataclass(frozen=True, kw_only=True)
class TensorStream:
    """Tensors in the order of their layout, made on demand, whole or in blocks of rows."""

    layout: Layout
    tensors: Iterator[tuple[str, Tensor]]

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """Make a stream of existing tensors; larger elements first: that aligns all tensors."""
        items = sorted(tensors.items(), key=lambda item: -item[1].itemsize)
        layout = {n: TensorInfo(dtype=t.dtype, shape=tuple(t.shape)) for n, t in items}
        return cls(layout=layout, tensors=iter(items))

    def read_into_memory(self) -> dict[str, Tensor]:
        """Return all tensors, complete, in memory."""
        whole = {n: torch.empty(info.shape, dtype=info.dtype) for n, info in self.layout.items()}
        fill_from_blocks(whole, self.tensors)
        return whole


def write_tensors(
    path: Path, stream: TensorStream, *, metadata: Mapping[str, str] | None = None
) -> FileFacts:
    """Write the file at `path` from front to back; return its size and hash.

    Chunks are made, written and hashed at the same time, each in a thread of its own.
    """
    # Writing and hashing release the GIL: both run while this thread makes the next chunk.
    digest, num_bytes = hashlib.sha256(), 0
    pending: deque[tuple[Future[Any], ...]] = deque()
    with path.open("wb") as file, ThreadPoolExecutor(1) as writer, ThreadPoolExecutor(1) as hasher:
        for chunk in _make_chunks(stream, metadata):
            pending.append(
                (writer.submit(_write_chunk, file, chunk), hasher.submit(digest.update, chunk))
            )
            num_bytes += len(chunk)
            _await_chunks(pending, but=CHUNKS_AHEAD)
        _await_chunks(pending, but=0)
    return FileFacts(num_bytes=num_bytes, sha256=digest.hexdigest())


def _write_chunk(file: BufferedWriter, chunk: bytes | memoryview) -> None:
    starts = range(0, len(chunk), WRITE_BYTES)
    file.writelines(chunk[start : start + WRITE_BYTES] for start in starts)


def _await_chunks(pending: deque[tuple[Future[Any], ...]], *, but: int) -> None:
    while len(pending) > but:
        for future in pending.popleft():
            future.result()


def _make_chunks(
    stream: TensorStream, metadata: Mapping[str, str] | None
) -> Iterator[bytes | memoryview]:
    yield _make_header(stream.layout, metadata)
    # A stream yields (name, block) in order: all blocks of a tensor follow each other.
    by_name = groupby(stream.tensors, key=itemgetter(0))
    for (name, blocks), (due, info) in zip(by_name, stream.layout.items(), strict=True):
        num_elements = 0
        for _, block in blocks:
            assert (name, block.dtype, block.shape[1:]) == (due, info.dtype, info.shape[1:])
            num_elements += block.numel()
            for part in block.detach().contiguous().view(-1).split(BLOCK_ELEMENTS):
                yield _view_bytes(part.cpu())
        assert num_elements == math.prod(info.shape)


def _make_header(layout: Layout, metadata: Mapping[str, str] | None) -> bytes:
    """Return length and JSON; spaces pad them, and the tensors begin at a multiple of 8."""
    fields: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for name, info in layout.items():
        assert start % info.dtype.itemsize == 0, f"{name} would not be aligned"
        end = start + info.num_bytes
        dtype, shape = NAMES[info.dtype], list(info.shape)
        fields[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
        start = end
    content = json.dumps(fields, separators=(",", ":")).encode()
    content += b" " * (-len(content) % 8)
    return len(content).to_bytes(8, "little") + content


def _view_bytes(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor on the CPU, without a copy."""
    return tensor.view(-1).view(torch.uint8).numpy().data


class TensorFile(Mapping[str, Tensor]):
    """Tensors of a file; every access to a name reads that tensor from the disk."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        self.layout: Layout = {
            name: TensorInfo(dtype=DTYPES[entry["dtype"]], shape=tuple(entry["shape"]))
            for name, entry in header.items()
        }
        self._starts = {name: 8 + length + e["data_offsets"][0] for name, e in header.items()}

    def __getitem__(self, name: str) -> Tensor:
        info = self.layout[name]
        tensor = torch.empty(info.shape, dtype=info.dtype)
        with self._path.open("rb") as file:
            file.seek(self._starts[name])
            num_read = file.readinto(_view_bytes(tensor))
        assert num_read == info.num_bytes, f"{self._path} ends inside {name}"
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.layout)

    def __len__(self) -> int:
        return len(self.layout)


def is_finite(tensor: Tensor) -> bool:
    """Return True if no element is infinite or NaN; `isfinite` would make two more tensors."""
    return all(math.isfinite(extreme.item()) for extreme in tensor.aminmax())


def make_layout_like(shapes: Iterable[tuple[str, str, tuple[int, ...]]], source: Layout) -> Layout:
    """Return the layout of (name, name in `source`, shape), each with the dtype in `source`."""
    return {n: TensorInfo(dtype=source[s].dtype, shape=shape) for n, s, shape in shapes}


def saving_order(name: str) -> tuple[bool, str]:
    """Return a sort key: by name, but steps last: float32 would misalign float64 after it."""
    return name.endswith(".step"), name
