"""Training as a generator of events; the caller decides about reports and checkpoints.

A run's seed drives two generators: the first for the initial weights and the noise of growth, the
second for the order of the data. Warm and cold runs of a seed therefore read the same batches.
"""

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from warmcore.checkpoint.checkpoint import SavedCheckpoint, save_checkpoint
from warmcore.checkpoint.progress import Progress
from warmcore.corpus.prepare import Corpus
from warmcore.model.decoder import Decoder
from warmcore.specs import AverageName, RunSpec, derive_seed
from warmcore.specs.schedule import lr_factor
from warmcore.specs.train import check_parallel_training
from warmcore.tensors.files import TensorStream
from warmcore.training.averages import Averages
from warmcore.training.batches import read_train_batch
from warmcore.training.divergence import explain_broken_step, explain_divergence
from warmcore.training.evaluate import val_loss_nats
from warmcore.training.events import DivergedEvent, EvaluationEvent, Event, StepEvent
from warmcore.training.initial_state import InitialState, open_resume, open_start
from warmcore.training.loss import accumulate_gradients, choose_loss, compile_loss
from warmcore.training.optimizer import (
    build_optimizer,
    clip_gradients_,
    load_optimizer_tensors,
    optimizer_tensors,
    set_lr,
    vector_norm_weight,
)
from warmcore.training.ranks import ALONE, Ranks, gather_stream


class Training:
    """A run in memory: its model, optimizer and progress."""

    def __init__(self, spec: RunSpec, corpus: Corpus, model: Decoder, ranks: Ranks) -> None:
        self.spec = spec
        self.corpus = corpus
        self.model = model
        self.ranks = ranks
        self._averaging = ranks.wrap_averaging(model)
        self.optimizer = build_optimizer(model.named_parameters(), spec.model, spec.train)
        self.base_hash: str | None = None
        self.progress = Progress()
        self._loss_of = choose_loss(spec.train.precision)
        self._train_loss_of = (
            compile_loss(self._loss_of, model.device) if spec.train.compile else self._loss_of
        )
        self.averages = Averages(train=spec.train, num_steps=spec.budget_steps)
        self._data_seed = derive_seed("data", spec.seed)

    @classmethod
    def start(
        cls,
        spec: RunSpec,
        corpus: Corpus,
        *,
        device: str = "cpu",
        base: Path | None = None,
        ranks: Ranks = ALONE,
    ) -> Self:
        """Begin a run from fresh weights, or from the folder `base` of `spec.start_checkpoint`.

        Raises:
            ValueError: `base` is given without `spec.start_checkpoint` or the reverse, the base
                model cannot be grown into the target, the trunk is of another run, or this number
                of processes cannot share the run.
            CheckpointCorruptError: `base` is not the checkpoint that `spec` names.
        """
        check_parallel_training(spec.train, ranks.size, ranks.strategy)
        return cls.build(open_start(spec, corpus, base), device=device, ranks=ranks)

    @classmethod
    def resume(
        cls,
        spec: RunSpec,
        corpus: Corpus,
        checkpoint: Path,
        *,
        device: str = "cpu",
        ranks: Ranks = ALONE,
    ) -> Self:
        """Continue `spec` from a checkpoint of its own, bit for bit on a CPU.

        The number of processes may differ from the number that wrote the checkpoint.

        Raises:
            ValueError: the checkpoint is of another spec or other data, or this number of
                processes cannot share the run.
            CheckpointCorruptError: a file differs from its hash.
        """
        check_parallel_training(spec.train, ranks.size, ranks.strategy)
        return cls.build(open_resume(spec, corpus, checkpoint), device=device, ranks=ranks)

    @classmethod
    def build(cls, state: InitialState, *, device: str, ranks: Ranks) -> Self:
        """Bring a run's initial state into memory; all ranks must call this at once."""
        spec = state.spec
        model = Decoder(
            spec.model,
            context=spec.data.context,
            activation_checkpointing=spec.train.activation_checkpointing,
        )
        state.fill_model(model)
        training = cls(spec, state.corpus, ranks.place_model(model, device), ranks)
        load_optimizer_tensors(training.optimizer, state.read_optimizer())
        training.averages.load_tensors(state.averages, training.model)
        training.base_hash, training.progress = state.base_hash, state.progress
        ranks.wait_for_all()
        return training

    @property
    def step(self) -> int:
        """The number of steps that are done."""
        return self.progress.step

    @property
    def tokens(self) -> int:
        """The number of tokens that the run has trained on."""
        return self.step * self.spec.tokens_per_step

    @property
    def last_val_loss_nats(self) -> float | None:
        """The validation loss of the newest evaluation, in nats per token."""
        losses = self.progress.val_losses_nats
        return losses[-1] if losses else None

    def train_to_end(self) -> Iterator[Event]:
        """Train to the end and yield each event; the caller may stop or save at any event."""
        # Between two events the state is consistent: a checkpoint after any of them resumes the
        # same curve, bit for bit. Inside a step weights and moments are of different steps.
        while len(self.progress.val_losses_nats) < len(self.spec.evaluation_steps):
            event = self.advance()
            yield event
            if isinstance(event, DivergedEvent):
                return

    def advance(self) -> Event:
        """Do a step, or the evaluation that is due; all ranks must call this at once."""
        # Example: evaluations at steps 0, 3 and 7. At step 3 with a single loss so far, evaluation
        # 1 is due; with two losses it is done, and the next act is step 4.
        evaluation = len(self.progress.val_losses_nats)
        is_due = self.step == self.spec.evaluation_steps[evaluation]
        return self._evaluate_model(evaluation) if is_due else self._train_step()

    def _train_step(self) -> StepEvent | DivergedEvent:
        """Do a step; if it shows a divergence, return that event and update nothing."""
        started = time.perf_counter()
        loss, norm = self._compute_gradients()
        watch = self.progress.watch.with_loss(loss, self.spec.model.vocab_size)
        # A trunk stops early, but its schedule is that of its largest budget.
        num_steps = self.spec.budget_steps
        reason = explain_broken_step(loss, norm) or explain_divergence(watch, num_steps)
        if reason:
            return DivergedEvent(step=self.step, tokens=self.tokens, reason=reason)
        factor = lr_factor(self.step, num_steps, self.spec.train)
        set_lr(self.optimizer, factor)
        self.optimizer.step()
        self.progress = self.progress.model_copy(update={"step": self.step + 1, "watch": watch})
        self.averages.update_averages_(self.model, self.step)
        return StepEvent(
            step=self.step,
            tokens=self.tokens,
            loss_nats=loss,
            lr=self.spec.train.lr * factor,
            grad_norm=norm,
            seconds=time.perf_counter() - started,
        )

    def _compute_gradients(self) -> tuple[float, float]:
        """Leave clipped gradients in the weights; return the loss and the norm before clipping."""
        train = self.spec.train
        batch = read_train_batch(
            self.corpus.train,
            seed=self._data_seed,
            step=self.step,
            batch_size=train.batch_size,
            context=self.spec.data.context,
        )
        self.optimizer.zero_grad()
        rows = self.ranks.select_rows(batch).to(self.model.device)
        part = accumulate_gradients(
            self._train_loss_of, self._averaging, rows, parts=train.accumulate
        )
        loss = self.ranks.mean_over_ranks(part).item()
        weight = vector_norm_weight(train.clip, self.spec.model)
        return loss, clip_gradients_(self.optimizer, weight, train.grad_clip).item()

    def _evaluate_model(self, evaluation: int) -> EvaluationEvent | DivergedEvent:
        started = time.perf_counter()
        loss = self._val_loss_nats()
        if not math.isfinite(loss):
            reason = f"validation loss is {loss}"
            return DivergedEvent(step=self.step, tokens=self.tokens, reason=reason)
        averaged: dict[AverageName, float] = {}
        for name in self.averages.tensors:
            with self.averages.swap_with_weights(name, self.model):
                averaged[name] = self._val_loss_nats()
        losses = (*self.progress.val_losses_nats, loss)
        self.progress = self.progress.model_copy(update={"val_losses_nats": losses})
        return EvaluationEvent(
            step=self.step,
            tokens=self.tokens,
            evaluation=evaluation,
            val_loss_nats=loss,
            ema_val_loss_nats=averaged.get("ema"),
            swa_val_loss_nats=averaged.get("swa"),
            seconds=time.perf_counter() - started,
        )

    def _val_loss_nats(self) -> float:
        return val_loss_nats(
            self.model,
            self.corpus.val,
            context=self.spec.data.context,
            eval_tokens=self.spec.train.eval_tokens,
            # Not the compiled function: the last batch has another shape, and a resumed run must
            # measure the same value whether or not it compiles.
            loss_of=self._loss_of,
            ranks=self.ranks,
        )

    def save(self, directory: Path) -> SavedCheckpoint:
        """Write the checkpoint folder `directory`, whole or not at all; only rank 0 writes."""
        weights, optimizer, averages = self._gather_streams()
        return save_checkpoint(
            directory,
            weights=weights,
            optimizer=optimizer,
            averages=averages,
            run=self.spec,
            data_hash=self.corpus.data_hash,
            base_hash=self.base_hash,
            tokens=self.tokens,
            progress=self.progress,
            attached=self.corpus.attached,
        )

    def gather_for_save(self) -> None:
        """Read every tensor while rank 0 saves: a sharded tensor is gathered from all ranks."""
        weights, optimizer, averages = self._gather_streams()
        for stream in (weights, optimizer, *averages.values()):
            for _ in stream.tensors:
                pass

    def _gather_streams(self) -> tuple[TensorStream, TensorStream, dict[AverageName, TensorStream]]:
        """Return weights, optimizer and averages; reading them gathers them from all ranks."""
        weights, optimizer = self.model.state_dict(), optimizer_tensors(self.optimizer)
        averages = self.averages.tensors
        return (
            gather_stream(TensorStream.from_tensors(weights)),
            gather_stream(TensorStream.from_tensors(optimizer)),
            {
                name: gather_stream(TensorStream.from_tensors(tensors))
                for name, tensors in averages.items()
            },
        )
