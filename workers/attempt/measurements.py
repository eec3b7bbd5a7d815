"""From training events to measurements: one per step number, a step held back until it is whole."""

import math

from service.protocol import Measurement
from warmcore.training.events import EvaluationEvent, StepEvent


class Curve:
    """Merges the events of one step and keeps the time between measurements.

    A step is measured every `log_every` steps and wherever there is an evaluation. An evaluation
    follows its step, so it completes the measurement; a step alone is complete at the next one.
    """

    def __init__(self, *, log_every: int, tokens: int) -> None:
        self._log_every = log_every
        self._measured_tokens = tokens
        self._seconds = 0.0
        self._held: StepEvent | None = None

    def add(self, event: StepEvent | EvaluationEvent) -> Measurement | None:
        """Take an event; give the measurement that it completes, if it completes one."""
        if isinstance(event, EvaluationEvent):
            step, self._held = self._held, None
            return self._evaluated(event, step)
        complete = self.take()
        self._held = event
        self._seconds += event.seconds
        return complete

    def take(self) -> Measurement | None:
        """Give the present step's measurement, if it has one that was not given yet."""
        step, self._held = self._held, None
        if step is None or step.step % self._log_every:
            return None
        return self._measured(step)

    def _evaluated(self, event: EvaluationEvent, step: StepEvent | None) -> Measurement:
        base = self._measured(step) if step else Measurement(step=event.step, tokens=event.tokens)
        values = {
            "val_loss_nats": _finite(event.val_loss_nats),
            "ema_val_loss_nats": _finite(event.ema_val_loss_nats),
            "swa_val_loss_nats": _finite(event.swa_val_loss_nats),
            "evaluation": event.evaluation or None,  # 0 is before training, and no rung
        }
        return base.model_copy(update=values)

    def _measured(self, step: StepEvent) -> Measurement:
        num_tokens, seconds = step.tokens - self._measured_tokens, self._seconds
        self._measured_tokens, self._seconds = step.tokens, 0.0
        return Measurement(
            step=step.step,
            tokens=step.tokens,
            loss_nats=_finite(step.loss_nats),
            lr=step.lr,
            grad_norm=_finite(step.grad_norm),
            tokens_per_second=_finite(num_tokens / seconds) if seconds else None,
            train_seconds=seconds,
        )


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
