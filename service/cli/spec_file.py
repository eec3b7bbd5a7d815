"""Spec files: YAML in the form of the API's JSON, with relative paths made absolute."""

import json
from pathlib import Path
from typing import Any

from warmcore.specs.sources import (
    HUB_PREFIX,
    Files,
    SavedDataset,
    TokenizerFile,
    parse_source,
    parse_tokenizer,
)
from warmcore.storage import plain_yaml


class SpecError(ValueError):
    """A file that is no spec; the message names the place and a value that would work."""


def load_spec(path: Path, folder: Path) -> dict[str, Any]:
    """Return the spec in `path`, with relative paths in `data` placed below `folder`.

    Raises:
        SpecError: the file is unreadable, no YAML or no mapping, or a value has no JSON form.
    """
    try:
        spec = plain_yaml.read_yaml(path)
    except ValueError as error:
        raise SpecError(str(error)) from None
    # YAML has values without a JSON form, for example .inf and a lone surrogate.
    try:
        json.dumps(spec, allow_nan=False, ensure_ascii=False).encode()
    except ValueError as error:
        raise SpecError(f"{path}: {error}; finite numbers and whole characters work") from None
    if not isinstance(spec, dict):
        kind = type(spec).__name__
        raise SpecError(f"{path}: a spec is a mapping of name, data, proxy, …, not a {kind}")
    return anchor_paths(spec, folder)


def anchor_paths(spec: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the spec with relative paths below `folder`.

    A name that is no path, for example `stdlib` or `byte`, stays.
    """
    # The service may run in another directory, so it must get absolute paths.
    data = spec.get("data")
    if not isinstance(data, dict):
        return spec
    paths = {"source": _anchor_source, "tokenizer": _anchor_tokenizer}
    given = {name: data[name] for name in paths if isinstance(data.get(name), str)}
    return spec | {"data": data | {name: paths[name](v, folder) for name, v in given.items()}}


def _anchor_source(source: str, folder: Path) -> str:
    match parse_source(source):
        case SavedDataset(path):
            return HUB_PREFIX + _join_path(str(path), folder)
        case Files(pattern) if not _is_elsewhere(pattern):
            return _join_path(pattern, folder)
        case _:
            return source


def _anchor_tokenizer(name: str, folder: Path) -> str:
    try:
        tokenizer = parse_tokenizer(name)
    except ValueError:
        return name  # the service refuses it, and its message names the values that work
    return _join_path(str(tokenizer.path), folder) if isinstance(tokenizer, TokenizerFile) else name


def _join_path(path: str, folder: Path) -> str:
    try:
        return str(folder / Path(path).expanduser())
    except RuntimeError:
        raise SpecError(f"data: {path!r}: there is no such user; an absolute path works") from None


def _is_elsewhere(source: str) -> bool:
    """Return whether no folder changes `source`: it is empty or a URI."""
    return not source or ":" in source.split("/", 1)[0]
