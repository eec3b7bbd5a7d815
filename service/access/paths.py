"""Where data and checkpoints may lie: what users name is confined before anything there is touched.

A path is judged as it resolves, links and all, and refused in the same words whether or not there
is anything. What a folder or a pattern holds is judged file by file.
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

# Plain names alone: no dots in front, no escapes, no query, nothing that a store reads otherwise.
NAMES_BELOW = re.compile(r"(?:/[A-Za-z0-9_-][A-Za-z0-9._-]*)+")

Roots = tuple[Path, ...] | None  # None: anywhere


def check_named_paths(data: DataSpec, roots: Roots) -> None:
    """Refuse a source, or a tokenizer.json, whose path leads out of `roots`; reads nothing there.

    Raises:
        Problem: 422 naming the field, its value and the roots.
    """
    if roots is None:
        return
    if isinstance(tokenizer := data.parsed_tokenizer, TokenizerFile):
        check_paths("data.tokenizer", data.tokenizer, [tokenizer.path], roots)
    match data.parsed_source:
        case StandardLibrary() | HubDataset():  # neither names a path
            return
        case Files(pattern=place) | SavedDataset(path=place):
            check_paths("data.source", data.source, [_fixed(place)], roots)


def check_listed_files(data: DataSpec, files: Iterable[SourceFile], roots: Roots) -> None:
    """Refuse a source if one of its files lies outside of `roots`, behind a link for example.

    Raises:
        Problem: 422 naming the field, its value and the roots.
    """
    if roots is None or isinstance(data.parsed_source, StandardLibrary):
        return
    check_paths("data.source", data.source, [file.path for file in files], roots)


def _fixed(source: str | Path) -> Path:
    """A pattern up to what varies in it, which then goes nowhere but down."""
    parts = Path(source).parts
    first = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    if ".." in parts[first:]:
        return Path("/")
    return Path(*parts[:first])


def check_paths(field: str, value: str, paths: Iterable[Path], roots: tuple[Path, ...]) -> None:
    """Raise a Problem for `field` unless every path lies below one of `roots`."""
    resolved = [root.resolve() for root in roots]
    for path in paths:
        if not any(resolve_path(path).is_relative_to(root) for root in resolved):
            works = ", ".join(map(str, roots)) or "none; stdlib and hf:NAME would work"
            message = f"not in a folder that may be read (WARMSCALE_DATA_ROOTS: {works})"
            raise bad_field(field, value, message)


def resolve_path(path: Path) -> Path:
    """As it is when the links on the way are followed; what cannot be is in no root."""
    try:
        return path.expanduser().resolve()
    except (OSError, RuntimeError, ValueError):
        return Path("/")


def check_published(uri: str, place: str, run_id: str) -> None:
    """Refuse a checkpoint that does not stand below its attempt's own place.

    Raises:
        Problem: 422.
    """
    path = local_path(uri)
    escapes = path is not None and not is_below(path, local_path(place))
    if not uri.startswith(place) or not NAMES_BELOW.fullmatch(uri[len(place) :]) or escapes:
        raise bad_field("uri", uri, f"run {run_id} publishes below {place}/")


def is_below(path: Path, root: Path | None) -> bool:
    """Whether `path`, links resolved, lies below `root`."""
    return root is not None and resolve_path(path).is_relative_to(resolve_path(root))
