"""One leased run: resume or grow or initialize, train, report, checkpoint, finish.

Trials and targets take this same way; only `RunSpec.growth` differs.
"""

import contextlib
import logging
import math
import time
from collections.abc import Callable
from typing import Literal, Self

from service.client import Client, StaleLeaseError
from service.protocol import CheckpointReport, FinishRequest, Lease, Outcome, Timing
from warmcore.corpus import prepare
from warmcore.corpus.prepare import Corpus
from warmcore.storage.backoff import Backoff, retry
from warmcore.training.events import DivergedEvent, EvaluationEvent, StepEvent
from warmcore.training.training import Training
from workers.attempt import checkpoints
from workers.attempt.measurements import Curve
from workers.attempt.options import AttemptOptions
from workers.attempt.provenance import provenance
from workers.attempt.reporter import CancelledError, Reporter
from workers.attempt.start import TrainingStart
from workers.failures import UnrunnableError

log = logging.getLogger(__name__)

_STORE_BACKOFF = Backoff(first_seconds=0.5, max_seconds=5.0)

Ending = Literal["succeeded", "pruned", "diverged", "released", "cancelled", "stale"]


def execute(
    lease: Lease,
    client: Client,
    *,
    options: AttemptOptions,
    draining: Callable[[], bool] = lambda: False,
) -> Ending:
    """Run `lease` to its end, or to a checkpoint from which another attempt goes on.

    Raises:
        UnrunnableError: no other worker could run it either.
        Exception: anything else that went wrong; the caller reports it.
    """
    with Reporter(client, lease) as reporter:  # first: a long preparation must not cost the lease
        try:
            attempt = _Attempt.prepared(lease, client, reporter, options)
            log.info("training", extra={"step": attempt.step, "device": options.device})
            return attempt.run(draining)
        except StaleLeaseError:
            log.warning("stale lease: another attempt has this run")
            return "stale"
        except CancelledError:
            return "cancelled"


class _DrainedError(Exception):
    """The fleet drains, and the store takes no checkpoint."""


class _Attempt:
    def __init__(
        self,
        lease: Lease,
        client: Client,
        reporter: Reporter,
        options: AttemptOptions,
        *,
        corpus: Corpus,
        training: Training,
    ) -> None:
        self._lease, self._client, self._reporter, self._options = lease, client, reporter, options
        self._corpus, self._training = corpus, training
        self._curve = Curve(log_every=lease.spec.train.log_every, tokens=training.tokens)
        self._evaluation_steps = frozenset(lease.spec.evaluation_steps)
        self._branch_steps = frozenset(lease.spec.branch_steps[:-1])  # the last one is final
        self._saved_step = training.step
        self._published: CheckpointReport | None = None
        self._saved_at = time.monotonic()
        self._timing = Timing()

    @classmethod
    def prepared(
        cls, lease: Lease, client: Client, reporter: Reporter, options: AttemptOptions
    ) -> Self:
        """Return an attempt with prepared data, and a training that may go on from a checkpoint.

        Waits for a store that is away, as long as `options` allow it.

        Raises:
            UnrunnableError: no worker could run this lease.
            CancelledError: the run was cancelled in the meantime.
        """
        try:
            corpus = prepare.prepare(lease.spec.data)
            start = TrainingStart(lease=lease, corpus=corpus, options=options)
            training = start.begin(before_wait=reporter.end_if_cancelled)
        except ValueError as error:
            raise UnrunnableError(str(error)) from error
        return cls(lease, client, reporter, options, corpus=corpus, training=training)

    @property
    def step(self) -> int:
        """Where the training is."""
        return self._training.step

    def run(self, draining: Callable[[], bool]) -> Ending:
        try:
            return self._train(draining)
        except _DrainedError:
            return self._finish("released")
        except CancelledError:
            return "cancelled"

    def _train(self, draining: Callable[[], bool]) -> Ending:
        for event in self._training.events():
            if isinstance(event, DivergedEvent):
                return self._finish("diverged", error=event.reason)
            self._note(event)
            match self._reporter.check():
                case "prune":
                    return self._finish("pruned")
                case "cancel":
                    return "cancelled"
                case "continue":
                    pass
            if isinstance(event, StepEvent) and event.step in self._evaluation_steps:
                continue  # its evaluation is next: a checkpoint between would split the measurement
            if draining():
                return self._release()
            self._checkpoint_if_due(draining)
        self._publish(self._saved_patiently(draining), final=True)
        return self._finish("succeeded")

    def _checkpoint_if_due(self, draining: Callable[[], bool]) -> None:
        if self._training.step in self._branch_steps:
            self._publish(self._saved_patiently(draining))
        elif time.monotonic() - self._saved_at >= self._options.checkpoint_seconds:
            self._insure()

    def _note(self, event: StepEvent | EvaluationEvent) -> None:
        if (measurement := self._curve.add(event)) is not None:
            self._reporter.add(measurement)
        if isinstance(event, StepEvent):
            self._timing = self._timed(event, time.time())

    def _timed(self, event: StepEvent, now: float) -> Timing:
        before = self._timing
        first = before.first_step_at or now - event.seconds
        return Timing(
            first_step_at=first,
            last_step_at=now,
            startup_seconds=max(0.0, first - self._options.leased_at),
            train_seconds=before.train_seconds + event.seconds,
        )

    def _release(self) -> Ending:
        if self._training.step > self._saved_step:
            self._insure()
        return self._finish("released")

    def _insure(self) -> None:
        """Checkpoint if the store takes one: without it an interruption only costs more steps."""
        try:
            saved = self._saved()
        except OSError as error:
            if self._options.ranks.size > 1:
                raise  # the other processes are in the middle of this save
            log.warning("the store takes no checkpoint", extra={"error": str(error)})
            self._saved_at = time.monotonic()
            return
        self._publish(saved)

    def _saved_patiently(self, draining: Callable[[], bool]) -> CheckpointReport:
        """A checkpoint that the run cannot do without: a store that is full or away is waited for.

        It would refuse every other attempt as well, so that failing would soon fail the study.
        """

        def end_if_stopped(error: OSError) -> None:
            log.warning("the store takes no checkpoint", extra={"error": str(error)})
            self._reporter.end_if_cancelled()
            if draining():
                raise _DrainedError

        return retry(
            self._saved,
            _STORE_BACKOFF,
            on=OSError,
            deadline=time.monotonic() + self._options.store_patience_seconds,
            is_worth_retrying=lambda _: self._options.ranks.size == 1,
            before_pause=end_if_stopped,
        )

    def _publish(self, saved: CheckpointReport, *, final: bool = False) -> None:
        report = saved.model_copy(update={"final": final})
        reply = self._client.publish(self._lease, report)
        self._published = report
        self._saved_step, self._saved_at = report.step, time.monotonic()
        log.info("checkpoint", extra={"step": report.step, "final": final})
        for superseded in reply.superseded:
            with contextlib.suppress(Exception):  # tidying must not end a run
                checkpoints.delete(superseded, of_run=self._lease.artifact_uri.rpartition("/")[0])

    def _saved(self) -> CheckpointReport:
        """This step's checkpoint, in place; the curve up to it accepted. Never written twice."""
        if self._published is not None and self._published.step == self._training.step:
            return self._published
        uri = f"{self._lease.artifact_uri}/step-{self._training.step:08d}"
        saved = checkpoints.save(self._training, uri)
        self._report_all()
        return CheckpointReport(
            step=saved.step,
            tokens=saved.tokens,
            uri=uri,
            hash=saved.hash,
            num_bytes=saved.num_bytes,
            val_loss_nats=_finite(saved.val_loss_nats),
        )

    def _report_all(self) -> None:
        """Wait until the curve up to here is accepted, so that resuming here leaves no gap."""
        if (measurement := self._curve.take()) is not None:
            self._reporter.add(measurement)
        self._reporter.flush()

    def _finish(self, outcome: Outcome, *, error: str | None = None) -> Ending:
        self._report_all()
        request = FinishRequest(
            outcome=outcome,
            val_loss_nats=_finite(self._training.last_val_loss_nats),
            error=error,
            provenance=provenance(
                self._training,
                data_hash=self._corpus.data_hash,
                device=self._options.device,
                num_threads=self._options.num_threads,
            ),
            timing=self._timing,
        )
        self._client.finish(self._lease, request)
        assert outcome != "failed", "failures are the fleet's to report"
        return outcome


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
