"""Checks of the paths that users name, before the service opens any file there.

A path is resolved first, with its links. The refusal does not depend on whether the path exists: it
tells nothing about the machine. Each file of a folder or a pattern is checked by itself.
"""

import glob
import re
from collections.abc import Iterable
from pathlib import Path

from service.problems import bad_field
from warmcore.corpus.sources import SourceFile
from warmcore.specs.data import DataSpec
from warmcore.specs.sources import (
    Files,
    HubDataset,
    SavedDataset,
    StandardLibrary,
    TokenizerFile,
)
from warmcore.storage.locations import local_path

# Plain names only. A leading dot, `..`, `%2e` or `?` could lead elsewhere once the store reads it.
NAMES_BELOW = re.compile(r"(?:/[A-Za-z0-9_-][A-Za-z0-9._-]*)+")

Roots = tuple[Path, ...] | None  # None: any path is allowed


def check_named_paths(data: DataSpec, roots: Roots) -> None:
    """Refuse a source, or a tokenizer.json, if its path leads out of `roots`; read nothing there.

    Raises:
        Problem: 422 naming the field, its value and the roots.
    """
    if roots is None:
        return
    # `byte` and `bpe:4096` name no file.
    if isinstance(tokenizer := data.parsed_tokenizer, TokenizerFile):
        check_paths("data.tokenizer", data.tokenizer, [tokenizer.path], roots)
    match data.parsed_source:
        case StandardLibrary() | HubDataset():  # neither names a path
            return
        case Files(pattern=place) | SavedDataset(path=place):
            check_paths("data.source", data.source, [_fixed_part(place)], roots)


def check_listed_files(data: DataSpec, files: Iterable[SourceFile], roots: Roots) -> None:
    """Refuse a source if any of its files lies outside of `roots`, behind a link for example.

    Raises:
        Problem: 422 naming the field, its value and the roots.
    """
    if roots is None or isinstance(data.parsed_source, StandardLibrary):
        return
    check_paths("data.source", data.source, [file.path for file in files], roots)


def _fixed_part(source: str | Path) -> Path:
    """Return the folders of a pattern that precede its first wildcard, `/data` of `/data/*/x`."""
    parts = Path(source).parts
    first = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    if ".." in parts[first:]:  # the wildcard part can leave the fixed part again
        return Path("/")
    return Path(*parts[:first])


def check_paths(field: str, value: str, paths: Iterable[Path], roots: tuple[Path, ...]) -> None:
    """Refuse `value` of `field` unless every path lies below a root.

    Raises:
        Problem: 422 naming the field, its value and the roots.
    """
    resolved = [root.resolve() for root in roots]
    for path in paths:
        if not any(resolve_path(path).is_relative_to(root) for root in resolved):
            works = ", ".join(map(str, roots)) or "none; stdlib and hf:NAME would work"
            message = f"not in a folder that may be read (WARMSCALE_DATA_ROOTS: {works})"
            raise bad_field(field, value, message)


def resolve_path(path: Path) -> Path:
    """Follow the links of a path; return `/`, which no root contains, where that fails."""
    try:
        return path.expanduser().resolve()
    except (OSError, RuntimeError, ValueError):
        return Path("/")


def check_published(uri: str, place: str, run_id: str) -> None:
    """Refuse a checkpoint URI that is not below `place`, the folder of its attempt.

    Raises:
        Problem: 422.
    """
    path = local_path(uri)
    escapes = path is not None and not is_below(path, local_path(place))
    if not uri.startswith(place) or not NAMES_BELOW.fullmatch(uri[len(place) :]) or escapes:
        raise bad_field("uri", uri, f"run {run_id} publishes below {place}/")


def is_below(path: Path, root: Path | None) -> bool:
    """Return whether `path` lies below `root`, with the links of both followed."""
    return root is not None and resolve_path(path).is_relative_to(resolve_path(root))
