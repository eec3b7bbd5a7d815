"""The start of a training: resumed from a checkpoint, grown from a base, or initialized."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from service.protocol import Lease
from warmcore.checkpoint.checkpoint import CheckpointCorruptError
from warmcore.corpus.prepare import Corpus
from warmcore.training.leading import LeadingTraining
from warmcore.training.training import Training
from workers.attempt import checkpoints, resume
from workers.attempt.options import AttemptOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingStart:
    """Lease, data and options from which a training starts."""

    lease: Lease
    corpus: Corpus
    options: AttemptOptions

    def begin_training(self, *, before_wait: Callable[[], object]) -> Training:
        """Return a training at the newest usable checkpoint, or at step 0 if none is left.

        `before_wait` is called before each wait for the store; it may raise to end the wait.

        Raises:
            OSError: the store cannot be reached, and may hold a checkpoint of this run.
            CheckpointCorruptError: the base or the trunk is missing or damaged.
            ValueError: no worker can run this spec.
        """
        return self._resume_newest(before_wait) or self._start_fresh()

    def _resume_newest(self, before_wait: Callable[[], object]) -> Training | None:
        options = self.options
        # Several processes cannot retry: the others are already in the middle of the same read.
        alone = options.ranks.size == 1
        return resume.read_newest(
            self.lease.resume_from,
            self._resume_from,
            before_wait=before_wait,
            patience_seconds=options.store_patience_seconds if alone else 0.0,
        )

    def _resume_from(self, checkpoint: Path) -> Training:
        spec, ranks, device = self.lease.spec, self.options.ranks, self.options.device
        return LeadingTraining.resume(spec, self.corpus, checkpoint, device=device, ranks=ranks)

    def _start_fresh(self) -> Training:
        spec, ranks, device = self.lease.spec, self.options.ranks, self.options.device
        if spec.start_checkpoint is None:
            return LeadingTraining.start(spec, self.corpus, device=device, ranks=ranks)
        try:
            with checkpoints.open_local(spec.start_checkpoint) as base:
                return LeadingTraining.start(
                    spec, self.corpus, device=device, base=base, ranks=ranks
                )
        except CheckpointCorruptError as error:
            # Not an `UnrunnableError`: the next attempt may read the file from another machine.
            name = "trunk" if spec.trunk else "growth.base"
            works = "targets can be started by hand from another trial or checkpoint"
            message = f"{name}: {error}; no other checkpoint replaces it: {works}"
            raise CheckpointCorruptError(message) from error
