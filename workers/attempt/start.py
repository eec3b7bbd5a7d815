"""The training of an attempt at its start: resumed, grown or initialized."""

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
    """Everything from which the training of a lease begins."""

    lease: Lease
    corpus: Corpus
    options: AttemptOptions

    def begin(self, *, before_wait: Callable[[], object]) -> Training:
        """Return the training of the newest usable checkpoint; without one, of step 0.

        `before_wait` is called before each wait for the store, and may raise to end the wait.

        Raises:
            OSError: the store cannot be reached, and may hold a checkpoint of this run.
            CheckpointCorruptError: the base or the trunk is missing or damaged.
            ValueError: no worker can run this spec.
        """
        return self._resume(before_wait) or self._start()

    def _resume(self, before_wait: Callable[[], object]) -> Training | None:
        options = self.options
        alone = options.ranks.size == 1  # else the other processes are in the middle of this too
        return resume.newest(
            self.lease.resume_from,
            self._resume_from,
            waits=before_wait,
            patience_seconds=options.store_patience_seconds if alone else 0.0,
        )

    def _resume_from(self, checkpoint: Path) -> Training:
        spec, ranks, device = self.lease.spec, self.options.ranks, self.options.device
        return LeadingTraining.resume(spec, self.corpus, checkpoint, device=device, ranks=ranks)

    def _start(self) -> Training:
        spec, ranks, device = self.lease.spec, self.options.ranks, self.options.device
        if spec.start_checkpoint is None:
            return LeadingTraining.start(spec, self.corpus, device=device, ranks=ranks)
        try:
            with checkpoints.local(spec.start_checkpoint) as base:
                return LeadingTraining.start(
                    spec, self.corpus, device=device, base=base, ranks=ranks
                )
        except CheckpointCorruptError as error:  # another attempt may read it from another machine
            name = "trunk" if spec.trunk else "growth.base"
            works = "targets can be started by hand from another trial or checkpoint"
            message = f"{name}: {error}; nothing else is taken in its place: {works}"
            raise CheckpointCorruptError(message) from error
