"""Source -> documents -> train/validation split; standard library only, so the service can look.

A document is a file. The split orders distinct documents by the SHA-256 of their content and gives
the first of them to validation, so it depends on content alone: not on paths, listing order or how
often a document occurs. A document too large to be moved as a whole is cut at line ends into
pieces, which are then documents of their own; a lone text file has a split that way.
"""

import glob
import hashlib
import os
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from warmcore.spec import DataSpec

# Above this, `inspect` adds up file sizes and does not read: a request must not hash gigabytes.
MAX_INSPECTED_BYTES = 64 * 2**20
# A document above this share of the corpus is cut, and a validation share has about 8 pieces.
MAX_DOCUMENT_SHARE = 1 / 20
PIECES_PER_SHARE = 8
MAX_PIECE_BYTES = 2**20
# Pieces end at a line's end within this many bytes, or within another piece size.
LINE_BYTES = 256
STDLIB_SKIPPED = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test"})


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """A file as the listing sees it; equal listings mean an unchanged corpus."""

    path: Path
    num_bytes: int
    mtime_ns: int


@dataclass(frozen=True, kw_only=True)
class Document:
    """`num_bytes` bytes of `path` from `offset`, known by the hash of their content."""

    path: Path
    offset: int
    num_bytes: int
    hash: str

    @property
    def num_tokens(self) -> int:
        """Bytes and the separator."""
        return self.num_bytes + 1

    def read(self) -> bytes:
        """Read the content again; ValueError when it is no longer what was hashed."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            content = file.read(self.num_bytes)
        if hashlib.sha256(content).hexdigest() != self.hash:
            raise ValueError(f"{self.path} changed while the corpus was prepared; prepare it again")
        return content


@dataclass(frozen=True, kw_only=True)
class Split:
    """Documents of both sides, each in order of content hash; none is in both."""

    train: tuple[Document, ...]
    val: tuple[Document, ...]
    tokenizer: str

    @cached_property
    def data_hash(self) -> str:
        """SHA-256 over the tokenizer and the content hashes of both sides, in order."""
        digest = hashlib.sha256(f"split 1 {self.tokenizer}\n".encode())
        for side, documents in (("train", self.train), ("val", self.val)):
            digest.update(f"{side} {len(documents)}\n".encode())
            digest.update("".join(f"{document.hash}\n" for document in documents).encode())
        return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class CorpusFacts:
    """What `inspect` found; the last three are None for a corpus too large to read in a request."""

    num_documents: int
    num_bytes: int
    num_train_tokens: int | None = None
    num_val_tokens: int | None = None
    data_hash: str | None = None


def inspect(spec: DataSpec) -> CorpusFacts:
    """Facts of the corpus at `spec.source`; ValueError when there is nothing to train on."""
    files = list_files(spec.source)
    num_bytes = sum(file.num_bytes for file in files)
    if num_bytes > MAX_INSPECTED_BYTES:
        return CorpusFacts(num_documents=len(files), num_bytes=num_bytes)
    split = split_corpus(files, spec)
    return CorpusFacts(
        num_documents=len(split.train) + len(split.val),
        num_bytes=num_bytes,
        num_train_tokens=count_tokens(split.train),
        num_val_tokens=count_tokens(split.val),
        data_hash=split.data_hash,
    )


def count_tokens(documents: Iterable[Document]) -> int:
    """Tokens of documents laid end to end."""
    return sum(document.num_tokens for document in documents)


def list_files(source: str) -> list[SourceFile]:
    """Non-empty files at `source`: the standard library, a file, a folder or a glob."""
    try:
        facts = [(path, path.stat()) for path in sorted(_paths(source)) if path.is_file()]
    except OSError as error:
        raise ValueError(f"source {source} cannot be read: {error}") from error
    files = [
        SourceFile(path=path, num_bytes=stat.st_size, mtime_ns=stat.st_mtime_ns)
        for path, stat in facts
        if stat.st_size
    ]
    if not files:
        raise ValueError(f"source {source} is empty: {len(facts)} files, 0 bytes")
    return files


def _paths(source: str) -> Iterator[Path]:
    if source == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        yield from (path for path in _walk(root, STDLIB_SKIPPED) if path.suffix == ".py")
        return
    try:
        path = Path(source).expanduser()
    except RuntimeError as error:
        raise ValueError(f"source {source} has no such home folder: {error}") from None
    if path.is_dir():
        yield from _walk(path, frozenset())
    elif path.exists():
        yield path
    elif glob.has_magic(source):
        matches = glob.glob(str(path), recursive=True)  # noqa: PTH207 - absolute patterns, too
        if not matches:
            raise ValueError(f"source {source} matches no files in {Path.cwd()}")
        yield from map(Path, matches)
    else:
        raise ValueError(
            f"source {source} does not exist; give 'stdlib', a file, a folder or a glob"
        )


def _walk(root: Path, skipped: frozenset[str]) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(root, onerror=_raise):
        subfolders[:] = [s for s in subfolders if s not in skipped and not s.startswith(".")]
        yield from (Path(folder, name) for name in names if not name.startswith("."))


def _raise(error: OSError) -> None:
    raise error


def split_corpus(files: Iterable[SourceFile], spec: DataSpec) -> Split:
    """Hash every document, then split by hash.

    Raises:
        ValueError: unreadable files, or a side with less than one context and its next token.
    """
    try:
        documents = sorted(_documents(files, spec), key=lambda document: document.hash)
    except OSError as error:
        raise ValueError(f"source {spec.source} cannot be read: {error}") from error
    num_tokens, needed = count_tokens(documents), spec.context + 1
    wanted = max(needed, round(spec.val_fraction * num_tokens))
    num_val = 0
    cut = 0
    while cut < len(documents) and num_val < wanted:
        num_val += documents[cut].num_tokens
        cut += 1
    num_train = num_tokens - num_val
    if min(num_val, num_train) < needed:
        raise ValueError(
            f"corpus has {num_tokens} tokens in {len(documents)} distinct documents, "
            f"{num_train} of them for training and {num_val} for validation; "
            f"training and validation each need at least context + 1 = {needed}"
        )
    return Split(train=tuple(documents[cut:]), val=tuple(documents[:cut]), tokenizer=spec.tokenizer)


def _documents(files: Iterable[SourceFile], spec: DataSpec) -> Iterable[Document]:
    """Distinct documents: files, and the pieces of those that are more than a share of all."""
    whole = _distinct(_whole(file.path) for file in files)
    share = min(MAX_DOCUMENT_SHARE, spec.val_fraction) * sum(d.num_bytes for d in whole)
    size = min(MAX_PIECE_BYTES, max(round(share / PIECES_PER_SHARE), spec.context + 1))
    return _distinct(
        piece
        for document in whole
        for piece in ([document] if document.num_bytes <= share else _pieces(document.path, size))
    )


def _distinct(documents: Iterable[Document]) -> Iterable[Document]:
    return {document.hash: document for document in documents}.values()


def _whole(path: Path) -> Document:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return Document(path=path, offset=0, num_bytes=file.tell(), hash=digest)


def _pieces(path: Path, size: int) -> Iterator[Document]:
    """Cut after at least `size` bytes, at a line's end where there is one soon enough."""
    offset = 0
    with path.open("rb") as file:
        while piece := file.read(size):
            if len(piece) == size:
                piece += file.readline(max(size, LINE_BYTES))
            digest = hashlib.sha256(piece).hexdigest()
            yield Document(path=path, offset=offset, num_bytes=len(piece), hash=digest)
            offset += len(piece)
