"""Files and folders that appear whole or not at all: written aside, synced, then renamed.

A process that is killed in between leaves a hidden entry `.NAME-<16 hex digits>` beside `NAME`, and
`NAME` as it was.
"""

import os
import secrets
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

ONLY_THIS_USER = 0o600
_DEFAULT_MODE = 0o666  # less the umask, as for every new file


def check_free(path: Path) -> None:
    """Raise ValueError if something is at `path` that writing there would replace."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} exists and is not empty; give a folder that is not there yet")


@contextmanager
def write_file(
    path: Path, *, mode: int = _DEFAULT_MODE, replace: bool = True
) -> Generator[BinaryIO]:
    """Yield a file aside to write to; it becomes `path` after the block, unless the block raises.

    Args:
        path: Path of the complete file.
        mode: Permissions of a new file, less the umask.
        replace: Replace a file at `path`.

    Raises:
        FileExistsError: `replace` is false, and a file is at `path` after the block.
        OSError: the file cannot be made, written or renamed.
    """
    aside = _name_aside(path)
    descriptor = os.open(aside, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(descriptor, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if replace:
            aside.rename(path)
        else:
            os.link(aside, path)  # a rename would replace a file that another process has made
        _sync(path.parent)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def write_folder(path: Path, *, may_lose: bool = False) -> Generator[Path]:
    """Yield a folder aside to write to; it becomes `path` after the block, unless the block raises.

    A folder that is at `path` already is replaced. With `may_lose` a folder with files stays, and
    ours is deleted: another process has written the same content meanwhile.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = _name_aside(path)
    aside.mkdir()
    try:
        yield aside
        # Sync the files before the rename: after a power failure a renamed folder could otherwise
        # hold empty files.
        for file in [*aside.iterdir(), aside]:
            _sync(file)
        if may_lose:
            _rename_unless_taken(aside, path)
        else:
            _rename_over(aside, path)
        _sync(path.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _name_aside(path: Path) -> Path:
    """Return a name beside `path` that no other process takes."""
    return path.with_name(f".{path.name}-{secrets.token_hex(8)}")


def _rename_unless_taken(aside: Path, path: Path) -> None:
    try:
        aside.rename(path)
    except OSError:
        if not path.exists():
            raise


def _rename_over(aside: Path, path: Path) -> None:
    # No rename replaces a folder that holds files: move that folder out of the way first.
    if not path.exists():
        aside.rename(path)
        return
    replaced = _name_aside(path)
    path.rename(replaced)
    aside.rename(path)
    shutil.rmtree(replaced)


def _sync(path: Path) -> None:
    """Flush a file's content, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
