"""A cache of tokenized corpora in memory-mapped files, shared by all runs on this machine.

The cache has a folder for each content: `<data_hash>/train.u16` and `val.u16`, or `.u32` above
65 536 ids, and the `tokenizer.json` that made the tokens. A small file for each listing of paths,
sizes and times names the folder of that listing: no file of an unchanged corpus is read again.
Folders are written aside and renamed: concurrent preparers and a kill leave whole folders only.

Files that hold tokens already are not copied. The file of their listing has the blocks of both
sides.
"""

import fcntl
import hashlib
import os
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from warmcore.corpus import token_files, tokenizer
from warmcore.corpus.documents import split_corpus
from warmcore.corpus.sources import SourceFile, holds_tokens, list_files
from warmcore.corpus.token_files import Ids, Segments
from warmcore.corpus.tokenize_documents import write_split
from warmcore.corpus.tokenizer import TOKENIZER, TextTokenizer
from warmcore.specs.data import DataSpec
from warmcore.specs.sources import (
    BYTE_VOCAB_SIZE,
    BpeTokens,
    ByteTokens,
    NoTokenizer,
    TokenizerFile,
    parse_tokenizer,
)
from warmcore.storage.atomic_writes import write_file

Tokens = Ids | Segments


@dataclass(frozen=True, kw_only=True, eq=False)
class Corpus:
    """Tokens of both sides, memory-mapped.

    `tokenizer_json` is the tokenizer that made the tokens. If it is None, the tokens are bytes, or
    with `is_byte` false of an unknown tokenizer.
    """

    train: Tokens
    val: Tokens
    data_hash: str
    vocab_size: int = BYTE_VOCAB_SIZE
    tokenizer_json: bytes | None = None
    is_byte: bool = True

    @property
    def tokenizer(self) -> str | None:
        """`byte`, the hash of the tokenizer.json, or None for an unknown tokenizer."""
        if self.tokenizer_json is not None:
            return hashlib.sha256(self.tokenizer_json).hexdigest()
        return "byte" if self.is_byte else None

    @property
    def attached(self) -> dict[str, bytes]:
        """Files for the run's checkpoints: with them the tokens can be decoded anywhere."""
        return {} if self.tokenizer_json is None else {TOKENIZER: self.tokenizer_json}

    def pin_spec(self, spec: DataSpec) -> DataSpec:
        """Return the `spec` of this corpus with the hash of the tokenizer.json that it names."""
        if not isinstance(spec.parsed_tokenizer, TokenizerFile):
            return spec
        pins = {"tokenizer_hash": self.tokenizer, "vocab_size": self.vocab_size}
        return spec.model_copy(update=pins)

    @property
    def num_train_tokens(self) -> int:
        """Tokens for training."""
        return len(self.train)

    @property
    def num_val_tokens(self) -> int:
        """Tokens for validation."""
        return len(self.val)


def default_cache_dir() -> Path:
    """Return `$XDG_CACHE_HOME/warmscale/corpora`, by default below `~/.cache`."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "warmscale" / "corpora"


def prepare_corpus(spec: DataSpec, cache_dir: Path | None = None) -> Corpus:
    """Return the corpus of `spec`, tokenized now unless the cache has it.

    Raises:
        ValueError: as `inspect_corpus`; or a side has fewer than context + 1 tokens; or the hash of
            the corpus or of the tokenizer.json is not the hash that the spec pins.
    """
    cache_dir = cache_dir or default_cache_dir()
    files = list_files(spec.source)
    if holds_tokens(files, spec.source):
        corpus = _prepare_token_files(files, spec, cache_dir)
    else:
        corpus = _prepare_text(files, spec, cache_dir)
    if spec.hash not in (None, corpus.data_hash):
        raise ValueError(
            f"source {spec.source} has changed: its hash with tokenizer "
            f"{tokenizer.identify_tokenizer(spec)} is {corpus.data_hash}, not {spec.hash}; "
            "restore it, or submit a new study"
        )
    return corpus


def make_tokenizer_json(spec: DataSpec, cache_dir: Path | None = None) -> bytes | None:
    """Return the tokenizer.json of the corpus; None for tokens that no known tokenizer made.

    `bpe:N` is trained on the corpus: the corpus is prepared, unless the cache has it.

    Raises:
        ValueError: as `prepare_corpus`.
    """
    match spec.parsed_tokenizer:
        case NoTokenizer():
            return None
        case ByteTokens():
            return tokenizer.make_byte_json()
        case TokenizerFile():
            return tokenizer.read_tokenizer_json(spec)
        case BpeTokens():
            cache_dir = cache_dir or default_cache_dir()
            return (cache_dir / prepare_corpus(spec, cache_dir).data_hash / TOKENIZER).read_bytes()


def _prepare_text(files: list[SourceFile], spec: DataSpec, cache_dir: Path) -> Corpus:
    listing = cache_dir / f"{_hash_listing(files, spec)}.listing"
    # Check again under the lock: another process may have prepared the corpus meanwhile.
    if not _is_prepared(listing):
        with _lock_listing(listing):
            if not _is_prepared(listing):
                _write_listing(listing, _write_corpus(files, spec, cache_dir))
    return _open_corpus(cache_dir / listing.read_text(), spec.tokenizer)


def _is_prepared(listing: Path) -> bool:
    # A listing outlives its folder if a user deletes folders to free space.
    if not listing.exists():
        return False
    folder = listing.parent / listing.read_text()
    return any((folder / f"train.{suffix}").exists() for suffix in ("u16", "u32"))


def _prepare_token_files(files: list[SourceFile], spec: DataSpec, cache_dir: Path) -> Corpus:
    found = token_files.find_shards(files, spec)
    vocab_size, made_by = _find_tokenizer(spec)
    listing = cache_dir / f"{_hash_listing(files, spec)}.shards"
    if not listing.exists():
        with _lock_listing(listing):
            split = token_files.split_shards(found, spec, vocab_size)
            _write_listing(listing, token_files.dump_split(split))
    return _open_token_files(listing, made_by, vocab_size)


def _find_tokenizer(spec: DataSpec) -> tuple[int, bytes | None]:
    """Return the number of ids, and the tokenizer.json that made the token files, if given."""
    if isinstance(spec.parsed_tokenizer, NoTokenizer):
        assert spec.vocab_size is not None, "DataSpec requires it"
        return spec.vocab_size, None
    loaded = TextTokenizer.from_json(tokenizer.read_tokenizer_json(spec), spec.tokenizer)
    return loaded.vocab_size, loaded.json


# Cached: the trials of a study share the corpus, and a process maps its files once.
@lru_cache(maxsize=8)
def _open_corpus(folder: Path, name: str) -> Corpus:
    # "u16" names the file, "<u2" is NumPy's name for little-endian numbers of 2 bytes.
    dtype = "u16" if (folder / "train.u16").exists() else "u32"
    train, val = (
        np.memmap(folder / f"{side}.{dtype}", dtype=f"<{dtype[0]}{int(dtype[1:]) // 8}", mode="r")
        for side in ("train", "val")
    )
    if isinstance(parse_tokenizer(name), ByteTokens):
        return Corpus(train=train, val=val, data_hash=folder.name)
    content = (folder / TOKENIZER).read_bytes()
    return Corpus(
        train=train,
        val=val,
        data_hash=folder.name,
        vocab_size=_count_ids(name, content),
        tokenizer_json=content,
    )


@lru_cache(maxsize=8)
def _open_token_files(listing: Path, made_by: bytes | None, vocab_size: int) -> Corpus:
    train, val, data_hash = token_files.load_split(listing.read_text())
    return Corpus(
        train=train,
        val=val,
        data_hash=data_hash,
        vocab_size=vocab_size,
        tokenizer_json=made_by,
        is_byte=False,
    )


def _count_ids(name: str, content: bytes) -> int:
    """Return N of bpe:N, even if training found fewer merges, or the ids of the tokenizer.json."""
    parsed = parse_tokenizer(name)
    if isinstance(parsed, BpeTokens):
        return parsed.vocab_size
    return TextTokenizer.from_json(content, name).vocab_size


def _hash_listing(files: Iterable[SourceFile], spec: DataSpec) -> str:
    """Return a hash of all that determines the split, without reading a file of text."""
    files = list(files)
    lines = [f"listing 1 {tokenizer.identify_tokenizer(spec)} {spec.context} {spec.val_fraction!r}"]
    if any(file.kind != "text" for file in files):
        lines.append(f"{spec.text_field!r} {spec.token_dtype} {spec.vocab_size}")
    lines += [f"{file.path.absolute()} {file.num_bytes} {file.mtime_ns}" for file in files]
    return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()


@contextmanager
def _lock_listing(listing: Path) -> Generator[None]:
    """Let a single process of this machine prepare the listing; other processes wait here."""
    listing.parent.mkdir(parents=True, exist_ok=True)
    with listing.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the kernel releases it when the process ends
        yield


def _write_corpus(files: list[SourceFile], spec: DataSpec, cache_dir: Path) -> str:
    """Split and tokenize the files; return the data hash."""
    # Below the cache and not in /tmp: unpacked records may need more space than /tmp has.
    scratch = TemporaryDirectory(prefix=".records-", dir=cache_dir, ignore_cleanup_errors=True)
    with scratch as folder:
        split = split_corpus(files, spec, Path(folder) / "records")
        write_split(split, spec, cache_dir)
    return split.data_hash


def _write_listing(path: Path, text: str) -> None:
    with write_file(path) as file:
        file.write(text.encode())
