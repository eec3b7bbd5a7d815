"""Provenance of a run: code, packages, data and machine."""

import functools
import hashlib
import platform
import socket
from importlib import metadata
from pathlib import Path

import warmcore
from service.protocol import Provenance
from warmcore.training.training import Training

_PACKAGES = ("torch", "numpy", "safetensors", "ray", "pydantic")


@functools.cache
def code_hash() -> str:
    """Return the SHA-256 of warmcore's source: path and content of each file, sorted by path."""
    digest = hashlib.sha256()
    root = Path(warmcore.__path__[0])
    for path in sorted(root.rglob("*.py")):
        # A zero byte ends the path and the content: no two sets of files give the same stream.
        digest.update(path.relative_to(root).as_posix().encode() + b"\0")
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()


@functools.cache
def _package_versions() -> dict[str, str]:
    versions = {name: metadata.version(name) for name in _PACKAGES}
    return {"python": platform.python_version(), **versions}


def collect_provenance(
    training: Training, *, data_hash: str, device: str, num_threads: int
) -> Provenance:
    """Return the provenance of `training` in this process."""
    return Provenance(
        warmscale_version=metadata.version("warmscale"),
        code_hash=code_hash(),
        packages=_package_versions(),
        data_hash=data_hash,
        base_hash=training.base_hash,
        device=device,
        num_threads=num_threads,
        processes=training.ranks.size,
        strategy=training.ranks.strategy if training.ranks.size > 1 else None,
        hostname=socket.gethostname(),
    )
