"""`python -m workers.convert export|import`: checkpoints from and to Hugging Face folders.

`warmscale export` and `warmscale import` start this module, because the service loads no torch.

Exit codes: 0 done, 1 a missing or damaged checkpoint, 2 refused arguments.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from rich.console import Console

from warmcore.checkpoint.checkpoint import (
    MANIFEST,
    CheckpointCorruptError,
    SavedCheckpoint,
    list_checkpoints,
    read_manifest,
)
from warmcore.huggingface.config import Dtype
from warmcore.huggingface.export import MAX_SHARD_BYTES, export_hf
from warmcore.huggingface.importer import import_hf
from warmcore.specs import AverageName, CheckpointRef, ModelSpec
from warmcore.specs.sizes import count_params
from workers.attempt import checkpoints

DONE, DAMAGED, REFUSED = 0, 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert, print the written files, and return the exit code."""
    options = _make_parser().parse_args(arguments)
    console = Console(stderr=True)
    try:
        with console.status(f"writing {options.out}"):
            done: dict[str, Any] = options.convert(options)
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return REFUSED
    except (CheckpointCorruptError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return DAMAGED
    text = json.dumps(done) if options.json else options.describe(done)
    sys.stdout.write(f"{text}\n")
    return DONE


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m workers.convert")
    parser.add_argument("--json", action="store_true")
    commands = parser.add_subparsers(required=True)
    export = commands.add_parser("export", help="a checkpoint to a Hugging Face folder")
    export.add_argument("checkpoint", help="URI, or the folder of a checkpoint or of a local run")
    export.add_argument("--hash", help="of the checkpoint; needed where it is not local")
    export.add_argument("--out", type=Path, required=True)
    export.add_argument("--weights", choices=["raw", *get_args(AverageName)], default="raw")
    export.add_argument("--dtype", choices=get_args(Dtype), default="float32")
    export.add_argument("--max-shard-bytes", type=int, default=MAX_SHARD_BYTES)
    export.set_defaults(convert=_export_checkpoint, describe=_describe_export)
    importing = commands.add_parser("import", help="a Hugging Face folder to a checkpoint")
    importing.add_argument("folder", type=Path)
    importing.add_argument("--out", required=True, help="URI or path of the checkpoint to write")
    importing.set_defaults(convert=_import_folder, describe=_describe_import)
    return parser


def _export_checkpoint(options: argparse.Namespace) -> dict[str, Any]:
    ref = _find_checkpoint(options.checkpoint, options.hash)
    with checkpoints.open_local(ref) as checkpoint:
        exported = export_hf(
            checkpoint,
            options.out,
            weights=options.weights,
            dtype=options.dtype,
            max_shard_bytes=options.max_shard_bytes,
            expected_hash=ref.hash,
        )
    return {
        "path": str(exported.path),
        "checkpoint": ref.model_dump(),
        "weights": options.weights,
        "dtype": options.dtype,
        "files": exported.files,
        "num_bytes": exported.num_bytes,
    }


def _find_checkpoint(checkpoint: str, given_hash: str | None) -> CheckpointRef:
    """Return the named checkpoint; for the folder of a local run, the newest."""
    path = checkpoints.local_path(checkpoint)
    if path is None:
        if given_hash is None:
            raise ValueError(f"{checkpoint} is not local: give the hash of the checkpoint")
        return CheckpointRef(uri=checkpoint, hash=given_hash)
    if not (path / MANIFEST).exists():
        path = next(iter(list_checkpoints(path / "checkpoints")), path)
    hash_ = given_hash or read_manifest(path)[1]
    return CheckpointRef(uri=path.resolve().as_uri(), hash=hash_)


def _import_folder(options: argparse.Namespace) -> dict[str, Any]:
    model: ModelSpec | None = None

    def write_checkpoint(path: Path) -> SavedCheckpoint:
        nonlocal model
        saved = import_hf(options.folder, path)
        model = read_manifest(path)[0].model
        return saved

    saved = checkpoints.store_at(write_checkpoint, options.out)
    assert model is not None
    path = checkpoints.local_path(options.out)
    uri = options.out if path is None else path.resolve().as_uri()
    return {"uri": uri, "hash": saved.hash, "model": model.model_dump()}


def _describe_export(done: dict[str, Any]) -> str:
    return f"{done['path']}: {', '.join(done['files'])} ({done['num_bytes']:,} bytes)"


def _describe_import(done: dict[str, Any]) -> str:
    """Return YAML for a spec: the base, and the model that a target widens or deepens."""
    base = {"uri": done["uri"], "hash": done["hash"]}
    lines = yaml.safe_dump({"growth": {"base": base}, "model": done["model"]}, sort_keys=False)
    num_params = count_params(ModelSpec.model_validate(done["model"])).total
    note = f"# {num_params:,} parameters; for a target, widen or deepen model"
    return f"{note}\n{lines.rstrip()}"


if __name__ == "__main__":
    sys.exit(main())
