"""Spec files: YAML to what the API takes, with relative sources made absolute."""

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
    """The file is no spec; the message says where and what works."""


def load_spec(path: Path, folder: Path) -> dict[str, Any]:
    """The spec in `path`, its relative data.source below `folder`.

    Raises:
        SpecError: it cannot be read, is no YAML, is no mapping, or holds what JSON cannot say.
    """
    try:
        spec = plain_yaml.read_yaml(path)
    except ValueError as error:
        raise SpecError(str(error)) from None
    try:
        json.dumps(spec, allow_nan=False, ensure_ascii=False).encode()
    except ValueError as error:
        raise SpecError(f"{path}: {error}; finite numbers and whole characters work") from None
    if not isinstance(spec, dict):
        kind = type(spec).__name__
        raise SpecError(f"{path}: a spec is a mapping of name, data, proxy, …, not a {kind}")
    return anchor_paths(spec, folder)


def anchor_paths(spec: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The spec with relative paths below `folder`; a name such as `stdlib` or `byte` stays."""
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
        return name  # the service refuses it and says what would work
    return _join_path(str(tokenizer.path), folder) if isinstance(tokenizer, TokenizerFile) else name


def _join_path(path: str, folder: Path) -> str:
    try:
        return str(folder / Path(path).expanduser())
    except RuntimeError:
        raise SpecError(f"data: {path!r}: there is no such user; a whole path works") from None


def _is_elsewhere(source: str) -> bool:
    """Return whether no folder changes `source`: it is empty or a URI."""
    return not source or ":" in source.split("/", 1)[0]
