"""Spec files: YAML to what the API takes, with relative sources made absolute."""

import json
from pathlib import Path
from typing import Any

import yaml

_HUB = "hf:"


class SpecError(ValueError):
    """The file is no spec; the message says where and what works."""


def load(path: Path, folder: Path) -> dict[str, Any]:
    """The spec in `path`, its relative data.source below `folder`.

    Raises:
        SpecError: it cannot be read, is no YAML, is no mapping, or holds what JSON cannot say.
    """
    try:
        spec = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeys)  # noqa: S506 - safe
        json.dumps(spec, allow_nan=False)
    except OSError as error:
        raise SpecError(f"{path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise SpecError(f"{path}: no YAML: {' '.join(str(error).split())}") from None
    except (TypeError, ValueError) as error:
        raise SpecError(f"{path}: {error}") from None
    if not isinstance(spec, dict):
        kind = type(spec).__name__
        raise SpecError(f"{path}: a spec is a mapping of name, data, proxy, …, not a {kind}")
    return anchored(spec, folder)


class _UniqueKeys(yaml.SafeLoader):
    """YAML's safe loader, for which a key given twice is an error and not a silent choice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:  # noqa: FBT001, FBT002 - PyYAML's signature
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in keys:
            if keys.count(key) > 1:
                line = node.start_mark.line + 1
                raise SpecError(f"key {key!r} is given twice in the mapping at line {line}")
        return super().construct_mapping(node, deep=deep)


def anchored(spec: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The spec with relative paths below `folder`; a name such as `stdlib` or `byte` stays."""
    data = spec.get("data")
    if not isinstance(data, dict):
        return spec
    paths = {"source": _source, "tokenizer": _tokenizer}
    given = {name: data[name] for name in paths if isinstance(data.get(name), str)}
    return spec | {"data": data | {name: paths[name](v, folder) for name, v in given.items()}}


def _source(source: str, folder: Path) -> str:
    if source.startswith((f"{_HUB}.", f"{_HUB}/", f"{_HUB}~")):
        return _HUB + _below(source.removeprefix(_HUB), folder)
    return source if is_name(source) else _below(source, folder)


def _tokenizer(name: str, folder: Path) -> str:
    return _below(name, folder) if name.endswith(".json") else name


def _below(path: str, folder: Path) -> str:
    return str(folder / Path(path).expanduser())


def is_name(source: str) -> bool:
    """Whether a source names something that no folder changes: `stdlib`, `hf:NAME`, a URI."""
    return source in ("", "stdlib") or ":" in source.split("/", 1)[0]
