"""A run and its branches without a service: training, measurements, checkpoints, resuming."""

import dataclasses
import json
import logging
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from warmcore.checkpoint.checkpoint import CheckpointCorruptError, checkpoint_path, list_checkpoints
from warmcore.corpus.prepare import Corpus, prepare_corpus
from warmcore.run_file import read_checkpoint_ref, read_spec, require_local_path
from warmcore.specs import RunSpec
from warmcore.specs.run import make_branch
from warmcore.storage.atomic_writes import write_file
from warmcore.training.events import DivergedEvent, EvaluationEvent, Event, StepEvent
from warmcore.training.leading import LeadingTraining
from warmcore.training.loss import CompilerMissingError
from warmcore.training.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from warmcore.checkpoint.progress import Progress


log = logging.getLogger("warmcore")
FINISHED, BAD_SPEC, DIVERGED, INTERRUPTED = 0, 2, 3, 130
NUM_KEPT = 2  # checkpoints; the older is used if the newest is damaged


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunLocation:
    """The folder of a run, the device, and the interval between checkpoints."""

    out: Path
    checkpoint_seconds: float = 60.0
    device: str = "cpu"
    ranks: Ranks = ALONE


def run_spec_file(path: Path, location: RunLocation, ranks: Ranks, device: str) -> int:
    """Run the spec in the file `path` as rank 0, and return the exit code."""
    # Set up the log here and not in `__main__`: rank 0 of several ranks is a process of its own.
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        spec = read_spec(path)
        corpus = prepare_corpus(spec.data)
        spec = spec.with_data(corpus.pin_spec(spec.data))
        return train_with_branches(
            spec, corpus, dataclasses.replace(location, ranks=ranks, device=device)
        )
    except (ValueError, CheckpointCorruptError, CompilerMissingError) as error:
        log.error("%s", error)  # noqa: TRY400 - a message for the user, not a traceback
        return BAD_SPEC


def train_with_branches(spec: RunSpec, corpus: Corpus, location: RunLocation) -> int:
    """Run `spec` and then each branch of it, and return the exit code of the last run."""
    run = LocalRun(spec, corpus, location)
    code = run.run_to_end()
    for budget, step in zip(spec.branches, spec.branch_steps, strict=True):
        if code != FINISHED:
            return code
        path = checkpoint_path(run.checkpoints, step).resolve()
        branch = make_branch(spec, budget, read_checkpoint_ref(str(path), "trunk"))
        log.info("cooling down at %g tokens per parameter, from step %d", budget, step)
        folder = location.out / f"tpp-{budget:g}"
        code = LocalRun(branch, corpus, dataclasses.replace(location, out=folder)).run_to_end()
    return code


class LocalRun:
    """A run in a folder: it starts or resumes, trains, measures and saves."""

    def __init__(self, spec: RunSpec, corpus: Corpus, location: RunLocation) -> None:
        self._spec = spec
        self._location = location
        self.checkpoints = location.out / "checkpoints"
        self._saved: Progress | None = None
        self._measurements = location.out / "measurements.jsonl"
        self._interrupted = False
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        self._training = self._resume_newest(corpus) or self._start_fresh(corpus)

    def run_to_end(self) -> int:
        """Train to the end and return the exit code."""
        # The handler only sets a flag: a checkpoint is possible between two events, not inside.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note_interrupt)
        training = self._training
        saved_at = time.monotonic()
        with self._measurements.open("a") as file:
            for event in training.train_to_end():
                self._record_event(event, file)
                if isinstance(event, DivergedEvent):
                    return DIVERGED
                if self._interrupted:
                    self._save_checkpoint(file)
                    log.info("interrupted at step %d; run again to continue", training.step)
                    return INTERRUPTED
                is_late = time.monotonic() - saved_at >= self._location.checkpoint_seconds
                if is_late or self._starts_branch(event):
                    self._save_checkpoint(file)
                    saved_at = time.monotonic()
            self._save_checkpoint(file)
        log.info("finished: val_loss_nats=%.4f", training.last_val_loss_nats)
        return FINISHED

    def _starts_branch(self, event: Event) -> bool:
        return isinstance(event, EvaluationEvent) and event.step in self._spec.branch_steps

    def _note_interrupt(self, _number: int, _frame: object) -> None:
        self._interrupted = True

    def _resume_newest(self, corpus: Corpus) -> LeadingTraining | None:
        """Resume from the newest usable checkpoint; return None if there is none."""
        # A process may have been killed at any point. A checkpoint counts only with the
        # measurements up to its step; the lines after them are cut, and the steps are done again.
        # Example: 40 lines on the disk, and a checkpoint of step 30 with log_every 1 and 3
        # evaluations. Lines 34 to 40 are cut, and the steps after 30 write them again.
        for path in list_checkpoints(self.checkpoints):
            try:
                training = LeadingTraining.resume(
                    self._spec,
                    corpus,
                    path,
                    device=self._location.device,
                    ranks=self._location.ranks,
                )
                self._cut_measurements(self._count_measured(training))
            except (CheckpointCorruptError, _MeasurementsMissingError) as error:
                log.warning("skipped %s", error)
                continue
            self._saved = training.progress
            log.info("resumed from %s", path)
            return training
        return None

    def _start_fresh(self, corpus: Corpus) -> LeadingTraining:
        ref = self._spec.start_checkpoint
        field = "trunk" if self._spec.trunk else "growth.base"
        base = require_local_path(ref.uri, field) if ref else None
        training = LeadingTraining.start(
            self._spec, corpus, base=base, device=self._location.device, ranks=self._location.ranks
        )
        self._measurements.write_text("")
        return training

    def _count_measured(self, training: LeadingTraining) -> int:
        """Return the number of lines in measurements.jsonl up to this step."""
        # Lines up to the start of a branch are in the trunk's file.
        log_every, start = self._spec.train.log_every, self._spec.start_step
        before = sum(step <= start for step in self._spec.evaluation_steps) if start else 0
        evaluations = len(training.progress.val_losses_nats) - before
        return training.step // log_every - start // log_every + evaluations

    def _cut_measurements(self, num_lines: int) -> None:
        """Keep the first `num_lines` lines; the steps of the other lines will be done again."""
        path = self._measurements
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        if len(lines) < num_lines:
            raise _MeasurementsMissingError(f"{path} has {len(lines)} of {num_lines} lines")
        with write_file(path) as file:
            file.write("".join(lines[:num_lines]).encode())

    def _record_event(self, event: Event, file: TextIO) -> None:
        match event:
            case StepEvent(step=step, loss_nats=loss, lr=lr):
                if step % self._spec.train.log_every:
                    return
                log.info("step %d/%d loss=%.4f lr=%.2e", step, self._spec.num_steps, loss, lr)
            case EvaluationEvent(step=step):
                log.info("step %d/%d %s", step, self._spec.num_steps, _format_losses(event))
            case DivergedEvent(step=step, reason=reason):
                log.error("diverged after step %d: %s", step, reason)
        file.write(json.dumps(dataclasses.asdict(event)) + "\n")

    def _save_checkpoint(self, file: TextIO) -> None:
        """Save the measurements, then the checkpoint; delete checkpoints that are not needed."""
        # In this order: a checkpoint without its measurements could not be resumed.
        if self._saved == self._training.progress:
            return
        file.flush()
        os.fsync(file.fileno())
        saved = self._training.save(checkpoint_path(self.checkpoints, self._training.step))
        self._saved = self._training.progress
        log.info("checkpoint %s hash=%s", saved.path, saved.hash)
        # Keep the checkpoints at which branches start, and the newest of the others.
        kept = {checkpoint_path(self.checkpoints, step) for step in self._spec.branch_steps}
        others = [path for path in list_checkpoints(self.checkpoints) if path not in kept]
        for old in others[NUM_KEPT:]:
            shutil.rmtree(old)


def _format_losses(event: EvaluationEvent) -> str:
    names = {"val_loss": event.val_loss_nats}
    names |= {"ema": event.ema_val_loss_nats, "swa": event.swa_val_loss_nats}
    return " ".join(f"{name}={loss:.4f}" for name, loss in names.items() if loss is not None)


class _MeasurementsMissingError(Exception):
    """The measurements up to a checkpoint are not on the disk."""
