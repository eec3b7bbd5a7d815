"""Training as a generator of events; the caller decides what to report and when to save.

A run's seed drives two generators: one for the initial weights (and the noise of growth), one for
the data order. So warm and cold runs of one seed read the same batches.
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
from warmcore.specs.train import check_shared
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
            ValueError: `base` is given where the spec names none or the other way round, the base
                model cannot be grown into the target, the trunk is of another run, or so many
                processes cannot share the run.
            CheckpointCorruptError: `base` is not the checkpoint that `spec` names.
        """
        check_shared(spec.train, ranks.size, ranks.strategy)
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
        """Continue `spec` from one of its own checkpoints, bit for bit on a CPU.

        Any number of processes may have written it, and any other may go on.

        Raises:
            ValueError: the checkpoint is of another spec or other data, or so many processes
                cannot share the run.
            CheckpointCorruptError: a file differs from its hash.
        """
        check_shared(spec.train, ranks.size, ranks.strategy)
        return cls.build(open_resume(spec, corpus, checkpoint), device=device, ranks=ranks)

    @classmethod
    def build(cls, state: InitialState, *, device: str, ranks: Ranks) -> Self:
        """Bring a run's initial state into memory; all ranks at once."""
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
        """Steps done."""
        return self.progress.step

    @property
    def tokens(self) -> int:
        """Tokens trained on."""
        return self.step * self.spec.tokens_per_step

    @property
    def last_val_loss_nats(self) -> float | None:
        """Validation loss of the newest evaluation."""
        losses = self.progress.val_losses_nats
        return losses[-1] if losses else None

    def train_to_end(self) -> Iterator[Event]:
        """Train from here to the end. Stop or save at any of them: state is whole at a yield."""
        while len(self.progress.val_losses_nats) < len(self.spec.evaluation_steps):
            event = self.advance()
            yield event
            if isinstance(event, DivergedEvent):
                return

    def gather_for_save(self) -> None:
        """What the ranks that follow do while rank 0 saves."""
        weights, optimizer, averages = self._gather_streams()
        for stream in (weights, optimizer, *averages.values()):
            for _ in stream.tensors:
                pass

    def advance(self) -> Event:
        """One step or the evaluation that is due; on all ranks at once."""
        evaluation = len(self.progress.val_losses_nats)
        due = self.step == self.spec.evaluation_steps[evaluation]
        return self._evaluate_model(evaluation) if due else self._train_step()

    def save(self, directory: Path) -> SavedCheckpoint:
        """Write the checkpoint folder `directory`, whole or not at all; rank 0 alone does."""
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

    def _gather_streams(self) -> tuple[TensorStream, TensorStream, dict[AverageName, TensorStream]]:
        """Weights, optimizer and averages, gathered while read: all ranks read them through."""
        weights, optimizer = self.model.state_dict(), optimizer_tensors(self.optimizer)
        averages = self.averages.tensors
        return (
            gather_stream(TensorStream.of(weights)),
            gather_stream(TensorStream.of(optimizer)),
            {name: gather_stream(TensorStream.of(tensors)) for name, tensors in averages.items()},
        )

    def _train_step(self) -> StepEvent | DivergedEvent:
        """One step. Nothing is updated, and no progress made, when it shows a divergence."""
        started = time.perf_counter()
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
        norm = clip_gradients_(self.optimizer, weight, train.grad_clip).item()
        watch = self.progress.watch.with_loss(loss, self.spec.model.vocab_size)
        num_steps = self.spec.budget_steps  # of the whole schedule, also for a trunk
        reason = explain_broken_step(loss, norm) or explain_divergence(watch, num_steps)
        if reason:
            return DivergedEvent(step=self.step, tokens=self.tokens, reason=reason)
        factor = lr_factor(self.step, num_steps, train)
        set_lr(self.optimizer, factor)
        self.optimizer.step()
        self.progress = self.progress.model_copy(update={"step": self.step + 1, "watch": watch})
        self.averages.update_averages_(self.model, self.step)
        return StepEvent(
            step=self.step,
            tokens=self.tokens,
            loss_nats=loss,
            lr=train.lr * factor,
            grad_norm=norm,
            seconds=time.perf_counter() - started,
        )

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
            loss_of=self._loss_of,  # never compiled: its shapes vary, and its value should not
            ranks=self.ranks,
        )
