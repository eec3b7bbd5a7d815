"""The folders below an artifact root, ROOT/STUDY/RUN/attempt-NNN/FOLDER/..., and their deletion."""

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
    """A folder that is not where checkpoints of its run belong; nothing deletes it."""


@dataclass(frozen=True, kw_only=True)
class Folder:
    """A folder of an attempt; `age_hours` is the age of its newest file, None if unknown."""

    uri: str
    run_id: str
    num_bytes: int
    age_hours: float | None

    def contains_uri(self, uri: str) -> bool:
        """Return whether a checkpoint at `uri` is this folder, or is inside it."""
        # With the slash, `step-1` does not contain `step-10`.
        return f"{uri}/".startswith(f"{self.uri}/")


def find_root(uri: str, study_id: str, run_id: str, attempt: int) -> str:
    """Return the root above a checkpoint's URI.

    Raises:
        OutsideRootError: the URI is not where the service told the attempt to write.
    """
    # For example file:///data/all/st_1/run_1/attempt-001/step-00000020 has the root
    # file:///data/all. A name with ".." could lead out of the attempt's folder.
    root, _, name = uri.partition(f"/{study_id}/{run_id}/attempt-{attempt:03d}/")
    if not root or not name or {"", ".", ".."} & set(name.split("/")):
        raise OutsideRootError(
            f"{uri} is not below STUDY/RUN/attempt-NNN of its run: "
            f"{study_id}/{run_id}/attempt-{attempt:03d}"
        )
    return root


def list_folders(root: str, study_id: str) -> list[Folder]:
    """Return every folder of every attempt of the study's runs below `root`."""
    files, base = locations.find_filesystem(f"{root}/{study_id}")
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
            age_hours=_compute_age_hours(infos),
        )
        for (run, attempt, name), infos in sorted(found.items())
    ]


def _compute_age_hours(infos: Iterable[dict[str, Any]]) -> float | None:
    times = [_read_modified_time(info) for info in infos]
    known = [at for at in times if at is not None]
    return (time.time() - max(known)) / 3600 if len(known) == len(times) else None


def _read_modified_time(info: dict[str, Any]) -> float | None:
    # fsspec passes on the field of each file system: `mtime` of local files, `LastModified` of S3,
    # `updated` of Google Cloud Storage, `created` of memory.
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
    """Delete a folder below `root`; a folder that is absent already is no error.

    Raises:
        OutsideRootError: a link below `root` leads to another place.
    """
    path, base = locations.local_path(uri), locations.local_path(root)
    # Object stores have no links: a name leads to nothing but itself.
    if path is None or base is None:
        locations.delete_checkpoint(uri)
        return
    try:
        with suppress(FileNotFoundError), ExitStack() as stack:
            _delete_by_descriptors(stack, base, path.relative_to(base).parts)
    except OSError as error:
        if error.errno not in (errno.ENOTDIR, errno.ELOOP):
            raise
        raise OutsideRootError(
            f"{uri} leads to another place, by a link below {root}, or is no folder"
        ) from None


# A user with write access to the store can replace a folder by a link at any moment. A path that
# was checked a moment ago may then lead elsewhere: `rmtree(".../attempt-001/step-20")` would delete
# the `step-20` of the link's target. An open descriptor stays on its folder even if the name moves.
# Hence open the root, then each name inside the folder before it, refusing links (O_NOFOLLOW).
def _delete_by_descriptors(stack: ExitStack, root: Path, names: Sequence[str]) -> None:
    """Delete the folder that `names` lead to from `root`; the stack closes the descriptors."""

    def open_folder(name: Path | str, flags: int, within: int | None) -> int:
        descriptor = os.open(name, os.O_RDONLY | os.O_DIRECTORY | flags, dir_fd=within)
        stack.callback(os.close, descriptor)
        return descriptor

    assert shutil.rmtree.avoids_symlink_attacks
    folder = above = open_folder(root, 0, None)
    for name in names:
        folder, above = open_folder(name, os.O_NOFOLLOW, folder), folder
    locations.delete_manifest_first(
        lambda: os.unlink(MANIFEST, dir_fd=folder), lambda: shutil.rmtree(names[-1], dir_fd=above)
    )
