"""Tokenize a corpus once into memory-mapped files, shared by every run on this machine.

The cache has a folder per content (`<data_hash>/train.u16`, `val.u16`) and a small file per listing
that names it, so that an unchanged listing of paths, sizes and times costs no reading. Folders are
written aside and renamed: concurrent preparers and a kill half-way leave whole folders only.
"""

import hashlib
import os
import secrets
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from warmcore.corpus import Document, SourceFile, Split, list_files, split_corpus
from warmcore.spec import DataSpec

SEPARATOR = b"\0"
Tokens = NDArray[np.uint16]


@dataclass(frozen=True, kw_only=True, eq=False)
class Corpus:
    """Tokens of both sides, memory-mapped."""

    train: Tokens
    val: Tokens
    data_hash: str

    @property
    def num_train_tokens(self) -> int:
        """Tokens for training."""
        return len(self.train)

    @property
    def num_val_tokens(self) -> int:
        """Tokens for validation."""
        return len(self.val)


def default_cache_dir() -> Path:
    """`$XDG_CACHE_HOME/warmscale/corpora`, by default below `~/.cache`."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "warmscale" / "corpora"


def prepare(spec: DataSpec, cache_dir: Path | None = None) -> Corpus:
    """Return the corpus of `spec`, tokenized at most once for its content.

    Raises:
        ValueError: as `DataSpec.inspect`, or the corpus is not the one that `spec.hash` names.
    """
    cache_dir = cache_dir or default_cache_dir()
    files = list_files(spec.source)
    listing = cache_dir / f"{_listing_hash(files, spec)}.listing"
    data_hash = listing.read_text() if listing.exists() else ""
    if not (cache_dir / data_hash / "train.u16").exists():
        split = split_corpus(files, spec)
        _write_split(split, cache_dir)
        _write_atomically(listing, split.data_hash)
        data_hash = split.data_hash
    if spec.hash not in (None, data_hash):
        raise ValueError(
            f"source {spec.source} has changed: its hash is {data_hash}, not {spec.hash}; "
            "restore it, or submit a new study"
        )
    return _open(cache_dir / data_hash)


@lru_cache(maxsize=8)
def _open(folder: Path) -> Corpus:
    return Corpus(
        train=np.memmap(folder / "train.u16", dtype=np.uint16, mode="r"),
        val=np.memmap(folder / "val.u16", dtype=np.uint16, mode="r"),
        data_hash=folder.name,
    )


def _listing_hash(files: Iterable[SourceFile], spec: DataSpec) -> str:
    """Everything that the split is computed from, as the file system shows it."""
    lines = [f"listing 1 {spec.tokenizer} {spec.context} {spec.val_fraction!r}"]
    lines += [f"{file.path.absolute()} {file.num_bytes} {file.mtime_ns}" for file in files]
    return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()


def _write_split(split: Split, cache_dir: Path) -> None:
    cache_dir.mkdir(parents=True, exist_ok=True)
    folder = cache_dir / split.data_hash
    if folder.exists():
        return
    aside = cache_dir / f".aside-{secrets.token_hex(8)}"
    aside.mkdir()
    try:
        _write_tokens(aside / "train.u16", split.train)
        _write_tokens(aside / "val.u16", split.val)
        aside.rename(folder)
    except OSError:
        if not folder.exists():  # or else another preparer was first, with the same content
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _write_tokens(path: Path, documents: Iterable[Document]) -> None:
    """Bytes as 16-bit tokens, each document followed by the separator; on disk when it returns."""
    with path.open("wb") as file:
        for document in documents:
            content = np.frombuffer(document.read() + SEPARATOR, dtype=np.uint8)
            file.write(content.astype("<u2").tobytes())
        file.flush()
        os.fsync(file.fileno())


def _write_atomically(path: Path, text: str) -> None:
    aside = path.with_name(f".aside-{secrets.token_hex(8)}")
    aside.write_text(text)
    aside.rename(path)
