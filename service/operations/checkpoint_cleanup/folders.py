"""What lies below an artifact root: ROOT/STUDY/RUN/attempt-NNN/FOLDER/…, and its deletion."""

import errno
import os
import shutil
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from warmcore.storage import locations
from warmcore.storage.file_facts import MANIFEST


class OutsideRootError(Exception):
    """A folder that is not where checkpoints of its run belong; it is left alone."""


@dataclass(frozen=True, kw_only=True)
class Folder:
    """A folder of an attempt; `age_hours` is that of its newest file, None: nobody knows."""

    uri: str
    run_id: str
    num_bytes: int
    age_hours: float | None

    def holds(self, uri: str) -> bool:
        """Whether a checkpoint at `uri` is this folder, or in it."""
        return f"{uri}/".startswith(f"{self.uri}/")


def find_root(uri: str, study_id: str, run_id: str, attempt: int) -> str:
    """The root that a checkpoint's URI is below.

    Raises:
        ElsewhereError: it does not stand where the service told its attempt to write.
    """
    root, _, name = uri.partition(f"/{study_id}/{run_id}/attempt-{attempt:03d}/")
    if not root or not name or {"", ".", ".."} & set(name.split("/")):
        raise OutsideRootError(f"{uri} is not below a root's {study_id}/{run_id}/attempt-{attempt}")
    return root


def list_folders(root: str, study_id: str) -> list[Folder]:
    """Every folder of every attempt of a study's runs below `root`."""
    files, base = locations.filesystem(f"{root}/{study_id}")
    found: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for path, info in files.find(base, detail=True).items():
        parts = str(path)[len(base) + 1 :].split("/")
        if len(parts) > 3 and parts[1].startswith("attempt-"):  # noqa: PLR2004 - a file in a folder
            found.setdefault((parts[0], parts[1], parts[2]), []).append(info)
    return [
        Folder(
            uri=f"{root}/{study_id}/{run}/{attempt}/{name}",
            run_id=run,
            num_bytes=sum(info["size"] or 0 for info in infos),
            age_hours=_age_hours(infos),
        )
        for (run, attempt, name), infos in sorted(found.items())
    ]


def _age_hours(infos: Iterable[dict[str, Any]]) -> float | None:
    times = [_modified(info) for info in infos]
    known = [at for at in times if at is not None]
    return (time.time() - max(known)) / 3600 if len(known) == len(times) else None


def _modified(info: dict[str, Any]) -> float | None:
    """Each file system has a name of its own for this."""
    for name in ("mtime", "LastModified", "last_modified", "updated", "created"):
        match info.get(name):
            case datetime() as at:
                return at.timestamp()
            case float() | int() as at:
                return float(at)
            case _:
                pass
    return None


def delete_folder(uri: str, root: str) -> None:
    """Delete a folder below `root`; one that is gone is deleted.

    Raises:
        ElsewhereError: a link leads to another place.
    """
    path, base = locations.local_path(uri), locations.local_path(root)
    if path is None or base is None:
        locations.delete(uri)
        return
    try:
        with suppress(FileNotFoundError), ExitStack() as opened:
            _delete(opened, base, path.relative_to(base).parts)
    except OSError as error:
        if error.errno not in (errno.ENOTDIR, errno.ELOOP):
            raise
        raise OutsideRootError(
            f"{uri} leads to another place, by a link below {root}, or is no folder"
        ) from None


def _delete(opened: ExitStack, root: Path, names: Sequence[str]) -> None:
    """Delete a folder from root to leaf by open folders, each of them no link.

    Who can write in the store may put a link in a folder's place at any moment: a path that was
    checked is another by the time that it is used.
    """

    def enter(name: Path | str, flags: int, within: int | None) -> int:
        folder = os.open(name, os.O_RDONLY | os.O_DIRECTORY | flags, dir_fd=within)
        opened.callback(os.close, folder)
        return folder

    assert shutil.rmtree.avoids_symlink_attacks
    folder = above = enter(root, 0, None)
    for name in names:
        folder, above = enter(name, os.O_NOFOLLOW, folder), folder
    # First the manifest: what a crash leaves half-deleted is no checkpoint any more.
    with suppress(FileNotFoundError):
        os.unlink(MANIFEST, dir_fd=folder)
    shutil.rmtree(names[-1], dir_fd=above)
