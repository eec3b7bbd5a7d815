"""`python -m warmcore run.yaml`: one run, no service.

Writes `measurements.jsonl` and checkpoints below `--out`, and continues from the newest good
checkpoint there. The curve has one line per evaluation and per `log_every` steps, in the order of
events; at a checkpoint their number follows from the run's progress, so that whatever a killed
process wrote after it is cut off and written again.

Exit codes: 0 finished, 2 bad spec, 3 diverged, 130 interrupted (run it again to continue).
"""

import argparse
import dataclasses
import json
import logging
import os
import shutil
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import unquote, urlsplit

import torch
import yaml
from pydantic import BaseModel, ValidationError

from warmcore.checkpoint import (
    CheckpointCorruptError,
    checkpoint_path,
    list_checkpoints,
    read_manifest,
)
from warmcore.data import Corpus, prepare
from warmcore.spec import RunSpec
from warmcore.train import DivergedEvent, EvaluationEvent, Event, StepEvent, Training

log = logging.getLogger("warmcore")

FINISHED, BAD_SPEC, DIVERGED, INTERRUPTED = 0, 2, 3, 130
NUM_KEPT = 2  # the newest checkpoint, and the one before it in case that is damaged


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, and return the exit code."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        spec = read_spec(options.spec)
        corpus = prepare(spec.data)
        out: Path = options.out or Path("runs") / options.spec.stem
        run = LocalRun(spec, corpus, out, checkpoint_seconds=options.checkpoint_seconds)
        return run.finish()
    except (ValueError, CheckpointCorruptError) as error:
        log.error("%s", error)  # noqa: TRY400 - a message for the user, not a traceback
        return BAD_SPEC


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m warmcore", description="Train one run.")
    parser.add_argument("spec", type=Path, help="run.yaml, see examples/run.yaml")
    parser.add_argument("--out", type=Path, help="folder to write to (runs/<name of the spec>)")
    parser.add_argument("--threads", type=int, help="CPU threads (torch's default)")
    parser.add_argument("--checkpoint-seconds", type=float, default=60.0, help="default 60")
    return parser


def read_spec(path: Path) -> RunSpec:
    """Read a RunSpec from YAML, in which `growth.base` may be just a checkpoint's path.

    Raises:
        ValueError: a line per wrong field: its name, its value and what works.
    """
    try:
        fields: Any = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    try:
        return RunSpec.model_validate(_with_base_hash(fields))
    except ValidationError as error:
        lines = [_explain(dict(problem)) for problem in error.errors(include_url=False)]
        raise ValueError("\n".join(f"{path}: {line}" for line in lines)) from error


def _with_base_hash(fields: Any) -> Any:
    match fields:
        case {"growth": {"base": str(uri)} as growth}:
            _, found = read_manifest(local_path(uri))
            return fields | {"growth": growth | {"base": {"uri": uri, "hash": found}}}
        case _:
            return fields


def local_path(uri: str) -> Path:
    """Path of a plain path or a file:// URI."""
    parts = urlsplit(uri)
    if parts.scheme not in ("", "file"):
        raise ValueError(f"growth.base.uri {uri} is not local; a path or a file:// URI works here")
    return Path(unquote(parts.path) if parts.scheme else uri).expanduser()


def _explain(problem: Mapping[str, Any]) -> str:
    """`train.lr = -1: Input should be greater than 0`; for an unknown key, the known ones."""
    *parents, name = problem["loc"] or ("spec",)
    where = ".".join(map(str, (*parents, name)))
    if problem["type"] == "extra_forbidden":
        return f"{where} is not a field; {', '.join(_fields_at(parents))} are"
    if problem["type"] == "missing":
        return f"{where} is required"
    return f"{where} = {problem['input']!r}: {problem['msg'].removeprefix('Value error, ')}"


def _fields_at(parents: Sequence[int | str]) -> Sequence[str]:
    model: type[BaseModel] = RunSpec
    for name in parents:
        annotation = model.model_fields[str(name)].annotation
        choices: tuple[Any, ...] = getattr(annotation, "__args__", (annotation,))
        model = next(c for c in choices if isinstance(c, type) and issubclass(c, BaseModel))
    return list(model.model_fields)


class LocalRun:
    """A run with its folder: resumes or starts, trains, measures, checkpoints."""

    def __init__(
        self, spec: RunSpec, corpus: Corpus, out: Path, *, checkpoint_seconds: float
    ) -> None:
        self._spec = spec
        self._checkpoints = out / "checkpoints"
        self._measurements = out / "measurements.jsonl"
        self._checkpoint_seconds = checkpoint_seconds
        self._interrupted = False
        self._checkpoints.mkdir(parents=True, exist_ok=True)
        self._training = self._resumed(corpus) or self._started(corpus)

    def finish(self) -> int:
        """Train to the end and return the exit code."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._interrupt)
        training = self._training
        saved_at = time.monotonic()
        with self._measurements.open("a") as file:
            for event in training.events():
                self._record(event, file)
                if isinstance(event, DivergedEvent):
                    return DIVERGED
                if self._interrupted:
                    self._save(file)
                    log.info("interrupted at step %d; run again to continue", training.step)
                    return INTERRUPTED
                if time.monotonic() - saved_at >= self._checkpoint_seconds:
                    self._save(file)
                    saved_at = time.monotonic()
            self._save(file)
        log.info("finished: val_loss_nats=%.4f", training.last_val_loss_nats)
        return FINISHED

    def _interrupt(self, _number: int, _frame: object) -> None:
        self._interrupted = True  # the state is whole only between events

    def _resumed(self, corpus: Corpus) -> Training | None:
        for path in list_checkpoints(self._checkpoints):
            try:
                training = Training.resume(self._spec, corpus, path)
                self._cut_measurements(self._num_measured(training))
            except (CheckpointCorruptError, _MeasurementsMissingError) as error:
                log.warning("skipped %s", error)
                continue
            log.info("resumed from %s", path)
            return training
        return None

    def _started(self, corpus: Corpus) -> Training:
        growth = self._spec.growth
        base = local_path(growth.base.uri) if growth else None
        training = Training.start(self._spec, corpus, base=base)
        self._measurements.write_text("")
        return training

    def _num_measured(self, training: Training) -> int:
        evaluations = len(training.progress.val_losses_nats)
        return training.step // self._spec.train.log_every + evaluations

    def _cut_measurements(self, num_lines: int) -> None:
        """Keep the first `num_lines`; what follows belongs to steps that will be done again."""
        path = self._measurements
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        if len(lines) < num_lines:
            raise _MeasurementsMissingError(f"{path} has {len(lines)} of {num_lines} lines")
        aside = path.with_suffix(".aside")
        aside.write_text("".join(lines[:num_lines]))
        aside.rename(path)

    def _record(self, event: Event, file: TextIO) -> None:
        match event:
            case StepEvent(step=step, loss_nats=loss, lr=lr):
                if step % self._spec.train.log_every:
                    return
                log.info("step %d/%d loss=%.4f lr=%.2e", step, self._training.num_steps, loss, lr)
            case EvaluationEvent(step=step, val_loss_nats=loss):
                log.info("step %d/%d val_loss=%.4f", step, self._training.num_steps, loss)
            case DivergedEvent(step=step, reason=reason):
                log.error("diverged after step %d: %s", step, reason)
        file.write(json.dumps(dataclasses.asdict(event)) + "\n")

    def _save(self, file: TextIO) -> None:
        """Measurements reach the disk before the checkpoint that counts on them."""
        file.flush()
        os.fsync(file.fileno())
        saved = self._training.save(checkpoint_path(self._checkpoints, self._training.step))
        log.info("checkpoint %s hash=%s", saved.path, saved.hash)
        for old in list_checkpoints(self._checkpoints)[NUM_KEPT:]:
            shutil.rmtree(old)


class _MeasurementsMissingError(Exception):
    """A checkpoint counts on measurements that are not there."""


if __name__ == "__main__":
    sys.exit(main())
