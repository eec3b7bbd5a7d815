"""YAML files of specs: only text, numbers, true and false, lists and mappings (torch-free).

A file is checked before any value is built: its length, its depth, and its number of values with
every alias written out. A few lines of aliases to aliases can stand for billions of values
("billion laughs").
"""

from pathlib import Path
from typing import Any

import yaml

# Far beyond any spec: a study of 100 lines has about 4 KiB.
MAX_BYTES = 256 * 1024
MAX_VALUES = 50_000
_MAX_DEPTH = 100
_TAG = "tag:yaml.org,2002:"
_PLAIN = frozenset(_TAG + t for t in ("str", "int", "float", "bool", "null", "seq", "map", "merge"))
# Errors of PyYAML's constructors, for example of an int with 5000 digits.
_CONSTRUCTION = (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError)


def read_yaml(path: Path) -> Any:
    """Return the value that the file holds.

    Raises:
        ValueError: the file is not plain YAML; the message has the file, the line and a remedy.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{path} cannot be read: {reason}") from None
    if len(data) > MAX_BYTES:
        raise ValueError(f"{path}: longer than {MAX_BYTES // 1024} KiB, which no spec is")
    try:
        return _load_text(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        bad = f"byte 0x{data[error.start]:02x} at offset {error.start}"
        raise ValueError(f"{path}: {bad} is not UTF-8; save the file as UTF-8") from None
    except RecursionError:
        raise ValueError(f"{path}: no YAML: nested too deeply") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: no YAML: {' '.join(str(error).split())}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _load_text(text: str) -> Any:
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _count_values(node, {}, ())
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _count_values(node: yaml.Node, sizes: dict[int, int], above: tuple[int, ...]) -> int:
    """Return the number of values in a node with all aliases written out; visit each node once."""
    # An alias is the same node object again: its count is known. If x is a list of 100 values,
    # `[*x, *x]` counts 203: itself, the list twice, and 200 values.
    if id(node) in above:
        raise ValueError(
            f"line {_line_number(node)}: an alias to a value that contains the alias; write it out"
        )
    if len(above) > _MAX_DEPTH:
        raise ValueError(f"line {_line_number(node)}: nested more than {_MAX_DEPTH} deep")
    if node.tag not in _PLAIN:
        tag = node.tag.replace(_TAG, "!!")
        raise ValueError(
            f"line {_line_number(node)}: tag {tag}; text, numbers, lists and mappings work"
        )
    if id(node) not in sizes:
        inner = (_count_values(child, sizes, (*above, id(node))) for child in _list_children(node))
        sizes[id(node)] = 1 + sum(inner)
    if sizes[id(node)] > MAX_VALUES:
        message = f"more than {MAX_VALUES} values with its aliases written out"
        raise ValueError(f"line {_line_number(node)}: {message}")
    return sizes[id(node)]


def _list_children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _line_number(node: yaml.Node) -> int:
    return node.start_mark.line + 1


class _Loader(yaml.SafeLoader):
    """The safe loader without dates; a key that is given twice is an error."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML's
        first: [(tag, pattern) for tag, pattern in known if tag in _PLAIN]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:  # noqa: FBT001, FBT002 - PyYAML's signature
        # PyYAML would silently keep the last value of a key.
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                message = f"line {_line_number(key)}: a list or a mapping as a key; a name works"
                raise ValueError(message)  # noqa: TRY004 - the file is wrong, not our argument
            if key.value in seen:
                raise ValueError(f"line {_line_number(key)}: key {key.value!r} is given twice")
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:  # noqa: FBT001, FBT002 - PyYAML's signature
        try:
            return super().construct_object(node, deep=deep)
        except _CONSTRUCTION as error:
            if not isinstance(node, yaml.ScalarNode):
                raise
            kind = node.tag.removeprefix(_TAG)
            given = node.value if len(node.value) <= 50 else f"{node.value[:50]}…"  # noqa: PLR2004
            message = f"line {_line_number(node)}: {given!r} is no {kind}"
            raise ValueError(message) from error
