"""Checkpoints: a folder of safetensors and a JSON manifest that holds the hash of every file.

The hash of a checkpoint is the SHA-256 of its manifest's bytes. The manifest holds the hash of
every other file, hence the hash of the checkpoint covers everything. A folder is written aside,
synced and renamed: it exists whole or not at all. Nothing is ever unpickled.

A checkpoint saves no random generator: after initialisation, randomness is a function of the run's
seed and the step (`warmcore.training.batches`), and the manifest holds both.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import get_args

from pydantic import ValidationError
from torch import Tensor

from warmcore.checkpoint.manifest import CheckpointManifest, ImportedModel
from warmcore.checkpoint.progress import Progress
from warmcore.specs import AverageName, BaseWeights, RunSpec
from warmcore.storage.atomic_writes import write_folder
from warmcore.storage.file_facts import MANIFEST, measure_file
from warmcore.tensors.files import TensorFile, TensorStream, write_tensors

MODEL = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"
AVERAGES: Mapping[AverageName, str] = MappingProxyType(
    {name: f"{name}.safetensors" for name in get_args(AverageName)}
)


class CheckpointCorruptError(Exception):
    """A file of a checkpoint is missing or differs from its hash."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Checkpoint:
    """A verified checkpoint with its tensors in memory."""

    manifest: CheckpointManifest
    hash: str
    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    averages: Mapping[AverageName, Mapping[str, Tensor]]


@dataclass(frozen=True, kw_only=True, eq=False)
class OpenCheckpoint(Checkpoint):
    """A verified checkpoint on the disk; each access reads a tensor from its file."""

    weights: TensorFile
    optimizer: TensorFile
    averages: Mapping[AverageName, TensorFile]

    def select_weights(self, name: BaseWeights) -> TensorFile:
        """Return the run's last weights, or an average of them.

        Raises:
            ValueError: the checkpoint does not have this average.
        """
        if name == "raw":
            return self.weights
        if name not in self.averages:
            found = ", ".join(["raw", *self.averages])
            raise ValueError(f"the checkpoint has no {name} weights, but {found}")
        return self.averages[name]


@dataclass(frozen=True, kw_only=True)
class SavedCheckpoint:
    """The place, hash and size of a saved checkpoint."""

    path: Path
    hash: str
    num_bytes: int
    step: int
    tokens: int
    val_loss_nats: float | None


def save_checkpoint(
    path: Path,
    *,
    weights: TensorStream,
    optimizer: TensorStream,
    run: RunSpec | ImportedModel,
    data_hash: str | None,
    base_hash: str | None,
    tokens: int,
    progress: Progress,
    averages: Mapping[AverageName, TensorStream] = MappingProxyType({}),
    attached: Mapping[str, bytes] = MappingProxyType({}),
) -> SavedCheckpoint:
    """Write the folder `path`, or replace it; `attached` holds the contents of further files."""
    with write_folder(path) as aside:
        # Weights, optimizer, averages: other ranks gather sharded tensors in the same order
        # (`Training.gather_for_save`).
        streams = {MODEL: weights, OPTIMIZER: optimizer}
        streams |= {AVERAGES[name]: stream for name, stream in averages.items()}
        files = {name: write_tensors(aside / name, stream) for name, stream in streams.items()}
        for name, content in attached.items():
            (aside / name).write_bytes(content)
            files[name] = measure_file(aside / name)
        manifest = CheckpointManifest(
            run=run if isinstance(run, RunSpec) else None,
            imported=run if isinstance(run, ImportedModel) else None,
            data_hash=data_hash,
            base_hash=base_hash,
            tokens=tokens,
            progress=progress,
            versions={name: version(name) for name in ("torch", "numpy", "safetensors")},
            files=files,
        )
        # The manifest comes last: it needs the hashes of the others.
        content = manifest.model_dump_json(indent=2).encode()
        (aside / MANIFEST).write_bytes(content)
    return SavedCheckpoint(
        path=path,
        hash=hashlib.sha256(content).hexdigest(),
        num_bytes=len(content) + sum(facts.num_bytes for facts in files.values()),
        step=progress.step,
        tokens=tokens,
        val_loss_nats=progress.val_losses_nats[-1] if progress.val_losses_nats else None,
    )


def load_checkpoint(path: Path, *, expected_hash: str | None = None) -> Checkpoint:
    """Read the folder `path` into memory and verify every hash.

    Raises:
        CheckpointCorruptError: a file is missing or differs from its hash.
    """
    opened = open_checkpoint(path, expected_hash=expected_hash)
    return Checkpoint(
        manifest=opened.manifest,
        hash=opened.hash,
        weights=dict(opened.weights),
        optimizer=dict(opened.optimizer),
        averages={name: dict(tensors) for name, tensors in opened.averages.items()},
    )


def open_checkpoint(path: Path, *, expected_hash: str | None = None) -> OpenCheckpoint:
    """Verify every hash of the folder `path`, and leave the tensors on the disk.

    Raises:
        CheckpointCorruptError: a file is missing or differs from its hash.
    """
    manifest, found_hash = read_manifest(path, expected_hash=expected_hash)
    # Hash the files before anything trusts them: a flipped bit would change a run silently.
    for name, facts in manifest.files.items():
        found = measure_file(path / name).sha256 if (path / name).is_file() else "no file"
        if found != facts.sha256:
            raise _corrupt_error(path / name, expected=facts.sha256, found=found)
    return OpenCheckpoint(
        manifest=manifest,
        hash=found_hash,
        weights=TensorFile(path / MODEL),
        optimizer=TensorFile(path / OPTIMIZER),
        averages={
            name: TensorFile(path / file)
            for name, file in AVERAGES.items()
            if file in manifest.files
        },
    )


def read_manifest(
    path: Path, *, expected_hash: str | None = None
) -> tuple[CheckpointManifest, str]:
    """Return the manifest and its hash, without reading the other files.

    Raises:
        CheckpointCorruptError: the manifest is missing, malformed or differs from `expected_hash`.
    """
    file = path / MANIFEST
    try:
        content = file.read_bytes()
    except OSError as error:
        found = error.strerror or "no file"
        raise _corrupt_error(file, expected=expected_hash or "a manifest", found=found) from error
    found_hash = hashlib.sha256(content).hexdigest()
    if expected_hash is not None and found_hash != expected_hash:
        raise _corrupt_error(file, expected=expected_hash, found=found_hash)
    try:
        return CheckpointManifest.model_validate_json(content), found_hash
    except ValidationError as error:
        found = error.errors()[0]["msg"]
        raise _corrupt_error(file, expected="a manifest of format 1", found=found) from error


def _corrupt_error(file: Path, *, expected: str, found: str) -> CheckpointCorruptError:
    return CheckpointCorruptError(f"{file} is corrupt: expected {expected}, found {found}")


def checkpoint_path(directory: Path, step: int) -> Path:
    """Return the folder of a step's checkpoint in `directory`; names sort by step."""
    return directory / f"step-{step:09d}"


def list_checkpoints(directory: Path) -> list[Path]:
    """Return the checkpoints in `directory`, newest first; a file in them may be damaged."""
    # A half-written folder has a hidden name until its rename: it does not match the pattern.
    return sorted(directory.glob("step-*"), reverse=True)
