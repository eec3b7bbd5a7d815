"""Source -> files, and the kind of each file by its extension (standard library only)."""

import glob
import os
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from warmcore.corpus import hub
from warmcore.corpus.glob_patterns import find_matches
from warmcore.specs.sources import Files, HubDataset, SavedDataset, StandardLibrary, parse_source

# Packages that are installed there, and tests: their text differs between machines.
STDLIB_SKIPPED = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test"})

Kind = Literal["text", "records", "tokens"]
# Each record is a document. Token files have no documents. Every other file is a document of text.
KINDS: dict[str, Kind] = {
    ".jsonl": "records",
    ".jsonl.gz": "records",
    ".parquet": "records",
    ".arrow": "records",
    ".npy": "tokens",
    ".bin": "tokens",
}


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """A file as the file system describes it; equal listings mean an unchanged corpus."""

    path: Path
    num_bytes: int
    mtime_ns: int

    @property
    def extension(self) -> str:
        """The extension in `KINDS`, for example `.jsonl.gz`; '' for `.txt` and all others."""
        name = self.path.name.lower()
        return next((extension for extension in KINDS if name.endswith(extension)), "")

    @property
    def kind(self) -> Kind:
        """The way to read the file."""
        return KINDS.get(self.extension, "text")


def list_files(source: str) -> list[SourceFile]:
    """Return the non-empty files of a source, in order of their paths.

    Raises:
        ValueError: the source is not there, cannot be read or is empty.
    """
    try:
        facts = [(path, path.stat()) for path in sorted(_find_paths(source)) if path.is_file()]
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


def holds_tokens(files: Iterable[SourceFile], source: str) -> bool:
    """Return True if all files hold tokens, False if no file does.

    Raises:
        ValueError: some files hold tokens and some do not.
    """
    files = list(files)
    tokens = [file for file in files if file.kind == "tokens"]
    if tokens and len(tokens) < len(files):
        other = next(file for file in files if file.kind != "tokens")
        raise ValueError(
            f"source {source} holds tokens ({tokens[0].path}) and text ({other.path}); "
            "a glob like shards/*.npy takes the files of a single kind"
        )
    return bool(tokens)


def _find_paths(source: str) -> Iterator[Path]:
    match parse_source(source):
        case StandardLibrary():
            root = Path(sysconfig.get_paths()["stdlib"])
            yield from (path for path in _walk_folder(root, STDLIB_SKIPPED) if path.suffix == ".py")
        case HubDataset(name):
            yield from hub.find_cached_files(name)
        case SavedDataset(path):
            yield from hub.find_saved_files(_expand_home(path, source))
        case Files(pattern):
            yield from _find_files(_expand_home(Path(pattern), source), source)


def _expand_home(path: Path, source: str) -> Path:
    """Return `path` with a folder in place of `~`; raise ValueError if no user has that name."""
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise ValueError(f"source {source} has no such home folder: {error}") from None


def _find_files(path: Path, source: str) -> Iterator[Path]:
    """Yield the file at `path`, the files below it, or the matches of a pattern."""
    # A name that exists is no pattern, even with a `[` in it.
    if path.is_dir():
        yield from _walk_folder(path, frozenset())
    elif path.exists():
        yield path
    elif glob.has_magic(source):
        _check_pattern(source)
        matches = list(find_matches(path))
        if not matches:
            raise ValueError(f"source {source} matches no files in {Path.cwd()}")
        yield from matches
    else:
        raise ValueError(
            f"source {source} does not exist; give 'stdlib', a file, a folder, a glob or hf:NAME"
        )


def _check_pattern(source: str) -> None:
    """Refuse a second `**`: it finds no more files, and the walk visits each folder many times."""
    times = source.split("/").count("**")
    if times > 1:
        raise ValueError(f"source {source} has {times} **, and 1 would work: folder/**/*.txt")


def _walk_folder(root: Path, skipped: frozenset[str]) -> Iterator[Path]:
    # By default `os.walk` skips a folder that cannot be read, and the corpus would lack its files.
    for folder, subfolders, names in os.walk(root, onerror=_raise_error):
        subfolders[:] = [s for s in subfolders if s not in skipped and not s.startswith(".")]
        yield from (Path(folder, name) for name in names if not name.startswith("."))


def _raise_error(error: OSError) -> None:
    raise error
