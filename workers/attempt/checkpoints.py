"""Checkpoint folders by URI. A local folder is used in place; an object store through a copy.

The manifest makes a folder a checkpoint. It names every file with a hash, and is uploaded last. A
`CheckpointRef` holds the hash of the manifest.
"""

import contextlib
import re
import tempfile
from collections.abc import Callable, Generator
from pathlib import Path

from warmcore.checkpoint.checkpoint import MANIFEST, SavedCheckpoint, read_manifest
from warmcore.specs import CheckpointRef
from warmcore.storage import locations
from warmcore.storage.locations import find_filesystem, local_path
from warmcore.training.training import Training

__all__ = ["delete_checkpoint", "local_path", "open_local", "save_training", "store_at"]

_CHECKPOINT = re.compile(r"/attempt-[0-9]+/[A-Za-z0-9_-][A-Za-z0-9._-]*")


def save_training(training: Training, uri: str) -> SavedCheckpoint:
    """Save the checkpoint of a training at `uri`."""
    return store_at(training.save, uri)


def store_at(write: Callable[[Path], SavedCheckpoint], uri: str) -> SavedCheckpoint:
    """Store the folder that `write` fills at `uri`; before the return it is no checkpoint."""
    path = local_path(uri)
    if path is not None:
        return write(path)
    with tempfile.TemporaryDirectory(prefix="warmscale-") as folder:
        saved = write(Path(folder) / "checkpoint")
        _upload_folder(Path(folder) / "checkpoint", uri)
    return saved


@contextlib.contextmanager
def open_local(ref: CheckpointRef) -> Generator[Path]:
    """Yield the checkpoint as a local folder, until the context ends.

    Raises:
        CheckpointCorruptError: the checkpoint is missing, or has another hash than `ref`.
    """
    with contextlib.ExitStack() as stack:
        path = local_path(ref.uri)
        if path is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="warmscale-"))
            path = Path(folder) / "checkpoint"
            _download_folder(ref.uri, path)
        read_manifest(path, expected_hash=ref.hash)
        yield path


def delete_checkpoint(uri: str, *, of_run: str) -> None:
    """Delete a checkpoint below the folder `of_run`. A missing checkpoint counts as deleted.

    Raises:
        ValueError: `uri` is not a checkpoint of this run.
    """
    # The URI comes from the service's answer. A worker trusts no answer with other files: only
    # <of_run>/attempt-2/step-00000040 and its like are deleted, and no symbolic link leads out.
    path, root = local_path(uri), local_path(of_run)
    escapes = path is not None and root is not None and not _is_below(path, root)
    if not uri.startswith(of_run) or not _CHECKPOINT.fullmatch(uri[len(of_run) :]) or escapes:
        raise ValueError(f"{uri} is not a checkpoint below {of_run}; it is not deleted")
    locations.delete_checkpoint(uri)


def _is_below(path: Path, root: Path) -> bool:
    return path.resolve().is_relative_to(root.resolve())


def _upload_folder(folder: Path, uri: str) -> None:
    files, root = find_filesystem(uri)
    files.makedirs(root, exist_ok=True)
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    # The manifest goes last: an upload that breaks off leaves files, but no checkpoint.
    for path in sorted(paths, key=lambda path: path.name == MANIFEST):
        files.put_file(str(path), f"{root}/{path.relative_to(folder).as_posix()}")


def _download_folder(uri: str, folder: Path) -> None:
    files, root = find_filesystem(uri)
    with contextlib.suppress(FileNotFoundError):  # reading the manifest raises a clearer error
        files.get(root, str(folder), recursive=True)
