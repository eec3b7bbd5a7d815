"""The YAML file of a run: its spec, and messages about wrong fields."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from warmcore.checkpoint.checkpoint import read_manifest
from warmcore.specs import CheckpointRef, RunSpec
from warmcore.storage import locations, plain_yaml


def read_spec(path: Path) -> RunSpec:
    """Read a RunSpec from YAML; `growth.base` and `trunk` may be the path of a checkpoint.

    Raises:
        ValueError: the message has a line for each wrong field: name, value and a remedy.
    """
    # The hash of a checkpoint is in a manifest, and users need not copy it into their file.
    fields = plain_yaml.read_yaml(path)
    try:
        return RunSpec.model_validate(_add_hashes(fields))
    except ValidationError as error:
        lines = [_explain_problem(dict(problem)) for problem in error.errors(include_url=False)]
        raise ValueError("\n".join(f"{path}: {line}" for line in lines)) from error


def _add_hashes(fields: Any) -> Any:
    match fields:
        case {"growth": {"base": str(uri)} as growth}:
            found = read_checkpoint_ref(uri, "growth.base").model_dump()
            return _add_hashes(fields | {"growth": growth | {"base": found}})
        case {"trunk": str(uri)}:
            return fields | {"trunk": read_checkpoint_ref(uri, "trunk").model_dump()}
        case _:
            return fields


def read_checkpoint_ref(uri: str, field: str) -> CheckpointRef:
    """Return the reference to a local checkpoint, with the hash of its present manifest."""
    _, found = read_manifest(require_local_path(uri, field))
    return CheckpointRef(uri=uri, hash=found)


def require_local_path(uri: str, field: str) -> Path:
    """Return the path that `uri`, the value of `field`, names on this machine.

    Raises:
        ValueError: the URI is of an object store, or no path of this machine.
    """
    try:
        path = locations.local_path(uri)
        if path is not None:
            path = path.expanduser()
            path.exists()  # raises where the name is too long for the file system
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{field}.uri {uri!r} is no path: {error}") from None
    if path is None:
        raise ValueError(f"{field}.uri {uri} is not local; a path or a file:// URI works here")
    return path


def _explain_problem(problem: Mapping[str, Any]) -> str:
    """Return a line, e.g. `train.lr = -1: Input should be greater than 0`."""
    if not problem["loc"]:  # a problem of several fields: the message names them
        return str(problem["msg"]).removeprefix("Value error, ")
    *parents, name = problem["loc"]
    where = ".".join(map(str, (*parents, name)))
    if problem["type"] == "extra_forbidden":
        return f"{where} is not a field; {', '.join(_list_fields(parents))} are"
    if problem["type"] == "missing":
        return f"{where} is required"
    return f"{where} = {problem['input']!r}: {problem['msg'].removeprefix('Value error, ')}"


def _list_fields(parents: Sequence[int | str]) -> Sequence[str]:
    # From RunSpec down: `growth` is annotated `GrowthSpec | None`, and the model is the choice.
    model: type[BaseModel] = RunSpec
    for name in parents:
        annotation = model.model_fields[str(name)].annotation
        choices: tuple[Any, ...] = getattr(annotation, "__args__", (annotation,))
        model = next(c for c in choices if isinstance(c, type) and issubclass(c, BaseModel))
    return list(model.model_fields)
