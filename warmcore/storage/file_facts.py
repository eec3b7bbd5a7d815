"""Size and hash of a file, as a checkpoint's manifest lists them (torch-free)."""

import hashlib
from pathlib import Path
from typing import BinaryIO

from warmcore.specs.fields import NonNegativeInt, Spec

MANIFEST = "checkpoint.json"


class FileFacts(Spec):
    """Size and hash of a file."""

    num_bytes: NonNegativeInt
    sha256: str


def measure_file(path: Path) -> FileFacts:
    """Read the file at `path` once, and return its size and hash."""
    with path.open("rb") as file:
        return measure_open_file(file)


def measure_open_file(file: BinaryIO) -> FileFacts:
    """Read an open file to its end, and return the size and hash of the bytes read."""
    # 1 MiB at a time: a checkpoint's file may be larger than the memory.
    digest = hashlib.sha256()
    num_bytes = 0
    while chunk := file.read(2**20):
        digest.update(chunk)
        num_bytes += len(chunk)
    return FileFacts(num_bytes=num_bytes, sha256=digest.hexdigest())
