"""Folders that exist whole or not at all: written aside, synced and renamed."""

import os
import secrets
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path


def check_free(path: Path) -> None:
    """Raise ValueError if something is at `path` that writing there would replace."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} exists and is not empty; give a folder that is not there yet")


@contextmanager
def written_whole(path: Path) -> Generator[Path]:
    """A folder aside to write to, which becomes `path` when all went well; else it is deleted."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = _aside(path)
    aside.mkdir()
    try:
        yield aside
        _publish(aside, path)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def _aside(path: Path) -> Path:
    """Name beside `path` that no other process takes."""
    return path.with_name(f".{path.name}-{secrets.token_hex(8)}")


def _publish(aside: Path, path: Path) -> None:
    """Sync and rename; a folder in the way is moved aside first, as no rename replaces it."""
    for file in [*aside.iterdir(), aside]:
        _sync(file)
    if path.exists():
        replaced = _aside(path)
        path.rename(replaced)
        aside.rename(path)
        shutil.rmtree(replaced)
    else:
        aside.rename(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
