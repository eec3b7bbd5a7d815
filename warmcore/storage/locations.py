"""Where checkpoints are: folders by URI, on a disk or in an object store. Free of torch."""

import contextlib
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import fsspec

from warmcore.storage.file_facts import MANIFEST


def local_path(uri: str) -> Path | None:
    """Return the path of a plain path or a file:// URI; None for a URI of an object store."""
    # `Path.as_uri` writes "a b" as "a%20b", and fsspec would look for a file of that name.
    parts = urlsplit(uri)
    if parts.scheme == "file":
        return Path(unquote(parts.path))
    return None if parts.scheme else Path(uri)


def filesystem(uri: str) -> tuple[Any, str]:
    """The file system of a URI, and the folder in it, without a trailing slash."""
    files, root = fsspec.core.url_to_fs(local_path(uri) or uri)
    return files, str(root).rstrip("/")


def delete(uri: str) -> None:
    """Delete a checkpoint; one that is not there, or only half, is deleted."""
    files, root = filesystem(uri)
    # First the manifest: what a crash leaves half-deleted is no checkpoint any more.
    for path in (f"{root}/{MANIFEST}", root):
        with contextlib.suppress(FileNotFoundError):
            files.rm(path, recursive=path == root)
