"""Checkpoint folders by URI. A local folder is used in place; an object store through a copy.

The manifest is what makes a folder a checkpoint: it names every file with its hash, it is the last
to be uploaded, and a `CheckpointRef` is its hash.
"""

import contextlib
import re
import tempfile
from collections.abc import Callable, Generator
from pathlib import Path

from warmcore.checkpoint.checkpoint import MANIFEST, SavedCheckpoint, read_manifest
from warmcore.specs import CheckpointRef
from warmcore.storage import locations
from warmcore.storage.locations import filesystem, local_path
from warmcore.training.training import Training

__all__ = ["delete_checkpoint", "local_path", "open_local", "save_training", "store_at"]

_CHECKPOINT = re.compile(r"/attempt-[0-9]+/[A-Za-z0-9_-][A-Za-z0-9._-]*")


def save_training(training: Training, uri: str) -> SavedCheckpoint:
    """Store a run's checkpoint at `uri`."""
    return store_at(training.save, uri)


def store_at(write: Callable[[Path], SavedCheckpoint], uri: str) -> SavedCheckpoint:
    """Store what `write` writes at `uri`: complete when this returns, and no checkpoint before."""
    path = local_path(uri)
    if path is not None:
        return write(path)
    with tempfile.TemporaryDirectory(prefix="warmscale-") as folder:
        saved = write(Path(folder) / "checkpoint")
        _upload_folder(Path(folder) / "checkpoint", uri)
    return saved


@contextlib.contextmanager
def open_local(ref: CheckpointRef) -> Generator[Path]:
    """Give the checkpoint as a local folder, for as long as the context lasts.

    Raises:
        CheckpointCorruptError: it is not there, or is another checkpoint than `ref` means.
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
    """Delete a checkpoint; one that is not there is deleted.

    Raises:
        ValueError: it is none of this run's. Whoever answers, a worker deletes nothing else.
    """
    path, root = local_path(uri), local_path(of_run)
    escapes = path is not None and root is not None and not _is_below(path, root)
    if not uri.startswith(of_run) or not _CHECKPOINT.fullmatch(uri[len(of_run) :]) or escapes:
        raise ValueError(f"{uri} is no checkpoint below {of_run}; it is not deleted")
    locations.delete(uri)


def _is_below(path: Path, root: Path) -> bool:
    return path.resolve().is_relative_to(root.resolve())


def _upload_folder(folder: Path, uri: str) -> None:
    files, root = filesystem(uri)
    files.makedirs(root, exist_ok=True)
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    for path in sorted(paths, key=lambda path: path.name == MANIFEST):
        files.put_file(str(path), f"{root}/{path.relative_to(folder).as_posix()}")


def _download_folder(uri: str, folder: Path) -> None:
    files, root = filesystem(uri)
    with contextlib.suppress(FileNotFoundError):  # reading the manifest tells
        files.get(root, str(folder), recursive=True)
