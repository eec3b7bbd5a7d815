"""`python -m warmcore run.yaml`: one run, no service; a trunk with the run of each of its branches.

`python -m warmcore coord-check run.yaml` is in `warmcore.coord_cli`.

Writes `measurements.jsonl` and checkpoints below `--out`, and continues from the newest good
checkpoint there. The curve has one line per evaluation and per `log_every` steps, in the order of
events; at a checkpoint their number follows from the run's progress, so that whatever a killed
process wrote after it is cut off and written again. A branch has the same in a folder of its own
(`tpp-5` at 5 tokens per parameter), where its curve begins at its trunk's checkpoint.

Exit codes: 0 finished, 2 bad spec, 3 diverged, 130 interrupted (run it again to continue).
"""

import argparse
import dataclasses
import functools
import json
import logging
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO, get_args

import torch

from warmcore import coord_cli
from warmcore.branching import branch_of, branch_steps, evaluations_of, start_step
from warmcore.checkpoint import CheckpointCorruptError, checkpoint_path, list_checkpoints
from warmcore.data import Corpus, prepare
from warmcore.objective import CompilerMissingError
from warmcore.parallel import ALONE, Ranks
from warmcore.spec import RunSpec, Strategy
from warmcore.spec_file import local_path, read_spec, reference
from warmcore.train import DivergedEvent, EvaluationEvent, Event, StepEvent, Training

if TYPE_CHECKING:
    from warmcore.manifest import Progress

log = logging.getLogger("warmcore")

FINISHED, BAD_SPEC, DIVERGED, INTERRUPTED = 0, 2, 3, 130
NUM_KEPT = 2  # the newest checkpoint, and the one before it in case that is damaged


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, and return the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["coord-check"]:
        return coord_cli.main(arguments[1:])
    options = _parser().parse_args(arguments)
    if options.processes == 1:
        return run(options, ALONE, options.device)
    # By the name that other processes know; the program itself is `__main__`.
    from warmcore import __main__ as program  # noqa: PLC0415, PLW0406
    from warmcore.launch import Launch, lead_processes  # noqa: PLC0415

    launch = Launch(
        size=options.processes,
        strategy=options.strategy,
        device=options.device,
        num_threads=options.threads,
    )
    return lead_processes(functools.partial(program.run, options), launch)


def run(options: argparse.Namespace, ranks: Ranks, device: str) -> int:
    """Do what the command line says, leading the other ranks; return the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        spec = read_spec(options.spec)
        corpus = prepare(spec.data)
        spec = spec.with_data(corpus.pinned(spec.data))
        place = Place(
            out=options.out or Path("runs") / options.spec.stem,
            checkpoint_seconds=options.checkpoint_seconds,
            device=device,
            ranks=ranks,
        )
        return train(spec, corpus, place)
    except (ValueError, CheckpointCorruptError, CompilerMissingError) as error:
        log.error("%s", error)  # noqa: TRY400 - a message for the user, not a traceback
        return BAD_SPEC


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """Where and how a run runs, and what it leaves there."""

    out: Path
    checkpoint_seconds: float = 60.0
    device: str = "cpu"
    ranks: Ranks = ALONE


def train(spec: RunSpec, corpus: Corpus, place: Place) -> int:
    """Run `spec`, and then each of its branches in turn; return the exit code."""
    run = LocalRun(spec, corpus, place)
    code = run.finish()
    for budget, step in zip(spec.branches, branch_steps(spec), strict=True):
        if code != FINISHED:
            return code
        path = checkpoint_path(run.checkpoints, step).resolve()
        branch = branch_of(spec, budget, reference(str(path), "trunk"))
        log.info("cooling down at %g tokens per parameter, from step %d", budget, step)
        folder = place.out / f"tpp-{budget:g}"
        code = LocalRun(branch, corpus, dataclasses.replace(place, out=folder)).finish()
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m warmcore", description="Train one run.")
    parser.add_argument("spec", type=Path, help="run.yaml, see examples/run.yaml")
    parser.add_argument("--out", type=Path, help="folder to write to (runs/<name of the spec>)")
    parser.add_argument("--threads", type=int, help="CPU threads (torch's default)")
    parser.add_argument("--checkpoint-seconds", type=float, default=60.0, help="default 60")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="default cpu")
    parser.add_argument("--processes", type=_count, default=1, help="that share the run; 1")
    parser.add_argument(
        "--strategy", default="ddp", choices=get_args(Strategy), help="of several processes"
    )
    return parser


def _count(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


class LocalRun:
    """A run with its folder: resumes or starts, trains, measures, checkpoints."""

    def __init__(self, spec: RunSpec, corpus: Corpus, place: Place) -> None:
        self._spec = spec
        self._place = place
        self.checkpoints = place.out / "checkpoints"
        self._branch_steps = branch_steps(spec)
        self._saved: Progress | None = None
        self._measurements = place.out / "measurements.jsonl"
        self._interrupted = False
        self.checkpoints.mkdir(parents=True, exist_ok=True)
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
                late = time.monotonic() - saved_at >= self._place.checkpoint_seconds
                if late or self._branches_at(event):
                    self._save(file)
                    saved_at = time.monotonic()
            self._save(file)
        log.info("finished: val_loss_nats=%.4f", training.last_val_loss_nats)
        return FINISHED

    def _branches_at(self, event: Event) -> bool:
        return isinstance(event, EvaluationEvent) and event.step in self._branch_steps

    def _interrupt(self, _number: int, _frame: object) -> None:
        self._interrupted = True  # the state is whole only between events

    def _resumed(self, corpus: Corpus) -> Training | None:
        for path in list_checkpoints(self.checkpoints):
            try:
                training = Training.resume(
                    self._spec, corpus, path, device=self._place.device, ranks=self._place.ranks
                )
                self._cut_measurements(self._num_measured(training))
            except (CheckpointCorruptError, _MeasurementsMissingError) as error:
                log.warning("skipped %s", error)
                continue
            self._saved = training.progress
            log.info("resumed from %s", path)
            return training
        return None

    def _started(self, corpus: Corpus) -> Training:
        ref = self._spec.start_checkpoint
        field = "trunk" if self._spec.trunk else "growth.base"
        base = local_path(ref.uri, field) if ref else None
        training = Training.start(
            self._spec, corpus, base=base, device=self._place.device, ranks=self._place.ranks
        )
        self._measurements.write_text("")
        return training

    def _num_measured(self, training: Training) -> int:
        """Lines up to here; those up to a branch's beginning are its trunk's."""
        log_every, start = self._spec.train.log_every, start_step(self._spec)
        before = sum(step <= start for step in evaluations_of(self._spec)) if start else 0
        evaluations = len(training.progress.val_losses_nats) - before
        return training.step // log_every - start // log_every + evaluations

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
            case EvaluationEvent(step=step):
                log.info("step %d/%d %s", step, self._training.num_steps, _losses(event))
            case DivergedEvent(step=step, reason=reason):
                log.error("diverged after step %d: %s", step, reason)
        file.write(json.dumps(dataclasses.asdict(event)) + "\n")

    def _save(self, file: TextIO) -> None:
        """Measurements reach the disk before the checkpoint that counts on them."""
        if self._saved == self._training.progress:
            return
        file.flush()
        os.fsync(file.fileno())
        saved = self._training.save(checkpoint_path(self.checkpoints, self._training.step))
        self._saved = self._training.progress
        log.info("checkpoint %s hash=%s", saved.path, saved.hash)
        kept = {checkpoint_path(self.checkpoints, step) for step in self._branch_steps}
        others = [path for path in list_checkpoints(self.checkpoints) if path not in kept]
        for old in others[NUM_KEPT:]:
            shutil.rmtree(old)


def _losses(event: EvaluationEvent) -> str:
    names = {"val_loss": event.val_loss_nats}
    names |= {"ema": event.ema_val_loss_nats, "swa": event.swa_val_loss_nats}
    return " ".join(f"{name}={loss:.4f}" for name, loss in names.items() if loss is not None)


class _MeasurementsMissingError(Exception):
    """A checkpoint counts on measurements that are not there."""


if __name__ == "__main__":
    sys.exit(main())
