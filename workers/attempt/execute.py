"""Execution of a leased run: resume, grow or initialize; train, report, checkpoint, finish.

Trials and targets take the same path; only `RunSpec.growth` differs.
"""

import contextlib
import logging
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
from workers.attempt.measurements import Curve, add_step_time, finite_or_none
from workers.attempt.options import AttemptOptions
from workers.attempt.provenance import collect_provenance
from workers.attempt.reporter import CancelledError, Reporter
from workers.attempt.start import TrainingStart
from workers.failures import UnrunnableError

log = logging.getLogger(__name__)

_STORE_BACKOFF = Backoff(first_seconds=0.5, max_seconds=5.0)

Ending = Literal["succeeded", "pruned", "diverged", "released", "cancelled", "stale"]


def execute_lease(
    lease: Lease,
    client: Client,
    *,
    options: AttemptOptions,
    draining: Callable[[], bool] = lambda: False,
) -> Ending:
    """Run `lease` to the end, or to a checkpoint from which another attempt can go on.

    Raises:
        UnrunnableError: no other worker could run this lease either.
        Exception: another failure; the caller reports it.
    """
    # The reporter renews the lease. It starts first, because preparing data can take minutes.
    with Reporter(client, lease) as reporter:
        try:
            attempt = _Attempt.prepared(lease, client, reporter, options)
            log.info("training", extra={"step": attempt.step, "device": options.device})
            return attempt.run_to_end(draining)
        except StaleLeaseError:
            log.warning("stale lease: another attempt has this run")
            return "stale"
        except CancelledError:
            return "cancelled"


class _DrainedError(Exception):
    """The fleet drains while the store accepts no checkpoint."""


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
        self._branch_steps = frozenset(
            lease.spec.branch_steps[:-1]
        )  # the last step gets the final checkpoint
        self._saved_step = training.step
        self._published: CheckpointReport | None = None
        self._saved_at = time.monotonic()
        self._timing = Timing()

    @classmethod
    def prepared(
        cls, lease: Lease, client: Client, reporter: Reporter, options: AttemptOptions
    ) -> Self:
        """Return an attempt with prepared data and a started or resumed training.

        Wait for a store that is away, as long as `options` allow it.

        Raises:
            UnrunnableError: no worker could run this lease.
            CancelledError: the run was cancelled during the wait.
        """
        try:
            corpus = prepare.prepare_corpus(lease.spec.data)
            start = TrainingStart(lease=lease, corpus=corpus, options=options)
            training = start.begin_training(before_wait=reporter.end_if_cancelled)
        except ValueError as error:
            raise UnrunnableError(str(error)) from error
        return cls(lease, client, reporter, options, corpus=corpus, training=training)

    @property
    def step(self) -> int:
        """The step that the training has reached."""
        return self._training.step

    def run_to_end(self, draining: Callable[[], bool]) -> Ending:
        try:
            return self._train_to_end(draining)
        except _DrainedError:
            return self._finish_attempt("released")
        except CancelledError:
            return "cancelled"

    def _train_to_end(self, draining: Callable[[], bool]) -> Ending:
        for event in self._training.train_to_end():
            if isinstance(event, DivergedEvent):
                return self._finish_attempt("diverged", error=event.reason)
            self._note_event(event)
            match self._reporter.check_decision():
                case "prune":
                    return self._finish_attempt("pruned")
                case "cancel":
                    return "cancelled"
                case "continue":
                    pass
            if isinstance(event, StepEvent) and event.step in self._evaluation_steps:
                # The evaluation of this step is the next event, and completes its measurement. A
                # checkpoint here would make the resumed run report the step without the evaluation.
                continue
            if draining():
                return self._save_and_release()
            self._checkpoint_if_due(draining)
        self._publish_checkpoint(self._save_patiently(draining), final=True)
        return self._finish_attempt("succeeded")

    def _checkpoint_if_due(self, draining: Callable[[], bool]) -> None:
        if self._training.step in self._branch_steps:
            self._publish_checkpoint(self._save_patiently(draining))
        elif time.monotonic() - self._saved_at >= self._options.checkpoint_seconds:
            self._try_checkpoint()

    def _note_event(self, event: StepEvent | EvaluationEvent) -> None:
        if (measurement := self._curve.add_event(event)) is not None:
            self._reporter.add_measurement(measurement)
        if isinstance(event, StepEvent):
            leased_at = self._options.leased_at
            self._timing = add_step_time(self._timing, event, now=time.time(), leased_at=leased_at)

    def _save_and_release(self) -> Ending:
        if self._training.step > self._saved_step:
            self._try_checkpoint()
        return self._finish_attempt("released")

    def _try_checkpoint(self) -> None:
        """Publish a checkpoint if the store accepts it; a failure only costs steps later."""
        try:
            saved = self._save_step()
        except OSError as error:
            if self._options.ranks.size > 1:
                raise  # the other processes are in the middle of this save
            log.warning("the store takes no checkpoint", extra={"error": str(error)})
            self._saved_at = time.monotonic()  # try again after the usual interval
            return
        self._publish_checkpoint(saved)

    def _save_patiently(self, draining: Callable[[], bool]) -> CheckpointReport:
        """Return a checkpoint that the run needs, and wait for a store that is full or away.

        The store would refuse every other attempt too, and repeated failures would fail the study.
        """

        def end_if_stopped(error: OSError) -> None:
            log.warning("the store takes no checkpoint", extra={"error": str(error)})
            self._reporter.end_if_cancelled()
            if draining():
                raise _DrainedError

        return retry(
            self._save_step,
            _STORE_BACKOFF,
            on=OSError,
            deadline=time.monotonic() + self._options.store_patience_seconds,
            is_worth_retrying=lambda _: self._options.ranks.size == 1,
            before_pause=end_if_stopped,
        )

    def _publish_checkpoint(self, saved: CheckpointReport, *, final: bool = False) -> None:
        report = saved.model_copy(update={"final": final})
        reply = self._client.publish(self._lease, report)
        self._published = report
        self._saved_step, self._saved_at = report.step, time.monotonic()
        log.info("checkpoint", extra={"step": report.step, "final": final})
        for superseded in reply.superseded:
            with contextlib.suppress(Exception):  # a failed clean-up must not end a run
                checkpoints.delete_checkpoint(
                    superseded, of_run=self._lease.artifact_uri.rpartition("/")[0]
                )

    def _save_step(self) -> CheckpointReport:
        """Save the checkpoint of this step, once, and report the curve up to it."""
        if self._published is not None and self._published.step == self._training.step:
            return self._published
        uri = f"{self._lease.artifact_uri}/step-{self._training.step:08d}"
        saved = checkpoints.save_training(self._training, uri)
        self._report_all()
        return CheckpointReport(
            step=saved.step,
            tokens=saved.tokens,
            uri=uri,
            hash=saved.hash,
            num_bytes=saved.num_bytes,
            val_loss_nats=finite_or_none(saved.val_loss_nats),
        )

    def _report_all(self) -> None:
        """Wait until the service has accepted the curve up to this step.

        An attempt that resumes at this step then leaves no gap in the curve.
        """
        if (measurement := self._curve.take_measurement()) is not None:
            self._reporter.add_measurement(measurement)
        self._reporter.flush()

    def _finish_attempt(self, outcome: Outcome, *, error: str | None = None) -> Ending:
        self._report_all()
        request = FinishRequest(
            outcome=outcome,
            val_loss_nats=finite_or_none(self._training.last_val_loss_nats),
            error=error,
            provenance=collect_provenance(
                self._training,
                data_hash=self._corpus.data_hash,
                device=self._options.device,
                num_threads=self._options.num_threads,
            ),
            timing=self._timing,
        )
        self._client.finish(self._lease, request)
        assert outcome != "failed", "the fleet reports failures"
        return outcome
