"""What a run was made with, as far as the process and the machine tell."""

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
    """SHA-256 of warmcore's source text: every file's relative path and content, in order."""
    digest = hashlib.sha256()
    root = Path(warmcore.__path__[0])
    for path in sorted(root.rglob("*.py")):
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
    """Describe the run `training` on this machine."""
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
