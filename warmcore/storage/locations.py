"""Places of checkpoints: folders by URI, on a disk or in an object store (torch-free)."""

import contextlib
from collections.abc import Callable
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


def find_filesystem(uri: str) -> tuple[Any, str]:
    """Return the file system of a URI, and the folder in it without a trailing slash."""
    files, root = fsspec.core.url_to_fs(local_path(uri) or uri)
    return files, str(root).rstrip("/")


def delete_checkpoint(uri: str) -> None:
    """Delete a checkpoint's folder; it may be absent already, in whole or in part."""
    files, root = find_filesystem(uri)
    delete_manifest_first(
        lambda: files.rm(f"{root}/{MANIFEST}"), lambda: files.rm(root, recursive=True)
    )


# A folder without a manifest is no checkpoint. For example a process that is killed between the two
# steps leaves `model.safetensors` alone, and nothing resumes from it. The other order would leave a
# manifest that lists missing files, which looks like a damaged checkpoint.
def delete_manifest_first(
    delete_manifest: Callable[[], object], delete_folder: Callable[[], object]
) -> None:
    """Delete a checkpoint in the safe order, with the caller's functions for its store."""
    for delete_step in (delete_manifest, delete_folder):
        with contextlib.suppress(FileNotFoundError):
            delete_step()
