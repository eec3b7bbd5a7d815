"""`warmscale export` and `warmscale import`: this process turns into `workers.convert`."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from service.cli.common import Exit, connect_client, fail

if TYPE_CHECKING:
    from service.runs.schemas import CheckpointView


def export_checkpoint(run: str, home: Path, options: list[str], *, as_json: bool) -> NoReturn:
    """Export the checkpoint in the folder `run`, or the final checkpoint of the run `run`."""
    if Path(run).exists():
        source = [run]
    elif run.startswith("run_"):
        # The converter compares the files with the hash: it refuses a damaged copy.
        checkpoint = _find_checkpoint(run, home)
        source = [checkpoint.uri, "--hash", checkpoint.hash]
    else:
        fail(Exit.USAGE, f"{run} is neither an existing folder nor the id of a run, run_…")
    _run_converter("export", [*source, *options], as_json=as_json)


def import_folder(folder: Path, options: list[str], *, as_json: bool) -> NoReturn:
    """Import a Hugging Face folder."""
    _run_converter("import", [str(folder), *options], as_json=as_json)


def _find_checkpoint(run_id: str, home: Path) -> "CheckpointView":
    """Return the run's final checkpoint; without a final checkpoint, the newest checkpoint."""
    from urllib.parse import quote

    from service.runs.schemas import CheckpointList

    with connect_client(home) as client:
        answer = client.get(f"/v1/runs/{quote(run_id, safe='')}/checkpoints")
    checkpoints = CheckpointList.model_validate(answer).items
    if not checkpoints:
        fail(Exit.CONFLICT, f"{run_id} has no checkpoint")
    return max(checkpoints, key=lambda checkpoint: (checkpoint.final, checkpoint.step))


def _run_converter(command: str, arguments: list[str], *, as_json: bool) -> NoReturn:
    # The converter needs torch, which this process must not import: exec replaces this process, and
    # the converter's output and exit code become those of the command.
    program = [sys.executable, "-m", "workers.convert", *(["--json"] if as_json else []), command]
    os.execv(program[0], [*program, *arguments])  # noqa: S606 - our own command
