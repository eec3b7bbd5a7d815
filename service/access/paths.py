"""Where data and checkpoints may lie: what users name is confined before anything there is touched.

A path is judged as it resolves, links and all, and refused in the same words whether or not there
is anything. What a folder or a pattern holds is judged file by file.
"""

import glob
import re
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import unquote, urlsplit

from sqlalchemy.orm import Session

from service.caller import Caller
from service.errors import Problem, bad_field, not_found
from service.settings import Settings
from service.studies.store import find
from warmcore import hub
from warmcore.data_spec import DataSpec
from warmcore.listing import list_files

# Plain names alone: no dots in front, no escapes, no query, nothing that a store reads otherwise.
_BELOW = re.compile(r"(?:/[A-Za-z0-9_-][A-Za-z0-9._-]*)+")
_STUDY_ID = re.compile(r"st_[0-9a-f]+")

Roots = tuple[Path, ...] | None  # None: anywhere


def check_data(data: DataSpec, roots: Roots) -> None:
    """Refuse a corpus, or a tokenizer.json, outside of `roots`.

    Raises:
        Problem: 422 naming the field, its value and the roots.
    """
    if roots is None:
        return
    if data.tokenizer.endswith(".json"):
        _check("data.tokenizer", data.tokenizer, [Path(data.tokenizer)], roots)
    if data.source == "stdlib":
        return
    path = data.source
    if path.startswith(hub.PREFIX):
        if not hub.is_path(path):
            return  # a name, looked up in the cache of `datasets`
        path = path.removeprefix(hub.PREFIX)
    _check("data.source", data.source, [_fixed(path)], roots)
    try:
        found = [file.path for file in list_files(data.source)]
    except ValueError:
        return  # it is looked at again by who can say what is wrong
    _check("data.source", data.source, found, roots)


def _fixed(source: str) -> Path:
    """A pattern up to what varies in it, which then goes nowhere but down."""
    parts = Path(source).parts
    first = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    if ".." in parts[first:]:
        return Path("/")
    return Path(*parts[:first])


def _check(field: str, value: str, paths: Iterable[Path], roots: tuple[Path, ...]) -> None:
    resolved = [root.resolve() for root in roots]
    for path in paths:
        if not any(_resolved(path).is_relative_to(root) for root in resolved):
            works = ", ".join(map(str, roots)) or "none; stdlib and hf:NAME would work"
            message = f"not in a folder that may be read (WARMSCALE_DATA_ROOTS: {works})"
            raise bad_field(field, value, message)


def _resolved(path: Path) -> Path:
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
    path = _local(uri)
    escapes = path is not None and not _is_below(path, _local(place))
    if not uri.startswith(place) or not _BELOW.fullmatch(uri[len(place) :]) or escapes:
        raise bad_field("uri", uri, f"run {run_id} publishes below {place}/")


def check_base(session: Session, caller: Caller, settings: Settings, uri: str) -> None:
    """Refuse an imported model that stands where this caller may not take one from.

    Raises:
        Problem: 404 for a run's of another project, 422 for any other place.
    """
    below = _in_store(settings.artifact_root, uri)
    if below is not None:
        _check_owner(session, caller, below, uri)
        return
    path = _local(uri)
    if path is None:
        message = f"not below {settings.artifact_root}/ (WARMSCALE_ARTIFACTS), nor a local folder"
        raise bad_field("base.uri", uri, message)
    if settings.readable is not None:
        _check("base.uri", uri, [path], settings.readable)


def _in_store(root: str, uri: str) -> str | None:
    """What follows the artifact root, however it is spelled; None outside of it."""
    path, home = _local(uri), _local(root)
    if path is not None:
        inside = home is not None and _is_below(path, home)
        return f"/{_resolved(path).relative_to(_resolved(home))}" if inside and home else None
    return uri[len(root) :] if uri.startswith(f"{root}/") else None


def _check_owner(session: Session, caller: Caller, below: str, uri: str) -> None:
    """A study's checkpoints are its project's; what lies beside them is everybody's."""
    if not _BELOW.fullmatch(below):
        raise bad_field("base.uri", uri, "the names below the artifact root are of A-Za-z0-9._-")
    owner = below.split("/")[1]
    if not _STUDY_ID.fullmatch(owner):
        return
    try:
        find(session, caller, owner)
    except Problem:
        raise not_found("checkpoint", uri) from None


def _is_below(path: Path, root: Path | None) -> bool:
    return root is not None and _resolved(path).is_relative_to(_resolved(root))


def _local(uri: str) -> Path | None:
    """Path of a plain path or a file:// URI, as workers read it; None for what is elsewhere."""
    parts = urlsplit(uri)
    if parts.scheme == "file":
        return Path(unquote(parts.path))
    return None if parts.scheme else Path(uri)
