"""Measurements from training events: one for each step, kept back until it is complete."""

import math

from service.protocol import Measurement, Timing
from warmcore.training.events import EvaluationEvent, StepEvent


class Curve:
    """Merger of the events of a step, and of the time between measurements.

    A step is measured every `log_every` steps and at every evaluation. An evaluation follows the
    event of the same step and completes the measurement. A step without an evaluation is complete
    when the next step arrives.
    """

    # With `log_every` 5 and an evaluation at step 7: step 5 is held until step 6 arrives, and then
    # given; step 6 is dropped; step 7 is held, and given together with the loss of its evaluation.

    def __init__(self, *, log_every: int, tokens: int) -> None:
        self._log_every = log_every
        self._measured_tokens = tokens
        self._seconds = 0.0
        self._held: StepEvent | None = None

    def add_event(self, event: StepEvent | EvaluationEvent) -> Measurement | None:
        """Add an event; return the measurement that it completes, if any."""
        if isinstance(event, EvaluationEvent):
            step, self._held = self._held, None
            return self._measure_evaluation(event, step)
        complete = self.take_measurement()
        self._held = event
        self._seconds += event.seconds
        return complete

    def take_measurement(self) -> Measurement | None:
        """Return the measurement of the held step; None if no step is held, or it is not logged."""
        step, self._held = self._held, None
        if step is None or step.step % self._log_every:
            return None
        return self._measure_step(step)

    def _measure_evaluation(self, event: EvaluationEvent, step: StepEvent | None) -> Measurement:
        base = (
            self._measure_step(step) if step else Measurement(step=event.step, tokens=event.tokens)
        )
        values = {
            "val_loss_nats": finite_or_none(event.val_loss_nats),
            "ema_val_loss_nats": finite_or_none(event.ema_val_loss_nats),
            "swa_val_loss_nats": finite_or_none(event.swa_val_loss_nats),
            "evaluation": event.evaluation or None,  # evaluation 0 precedes training: no rung
        }
        return base.model_copy(update=values)

    def _measure_step(self, step: StepEvent) -> Measurement:
        num_tokens, seconds = step.tokens - self._measured_tokens, self._seconds
        self._measured_tokens, self._seconds = step.tokens, 0.0
        return Measurement(
            step=step.step,
            tokens=step.tokens,
            loss_nats=finite_or_none(step.loss_nats),
            lr=step.lr,
            grad_norm=finite_or_none(step.grad_norm),
            tokens_per_second=finite_or_none(num_tokens / seconds) if seconds else None,
            train_seconds=seconds,
        )


def add_step_time(timing: Timing, event: StepEvent, *, now: float, leased_at: float) -> Timing:
    """Return `timing` with a further step that ended at `now`; moments are Unix seconds."""
    # The first step began `event.seconds` before it was reported. Leased at 100.0, with a first
    # step of 0.5 s that ends at 102.5: the start-up took 2.0 s.
    first = timing.first_step_at or now - event.seconds
    return Timing(
        first_step_at=first,
        last_step_at=now,
        startup_seconds=max(0.0, first - leased_at),
        train_seconds=timing.train_seconds + event.seconds,
    )


def finite_or_none(value: float | None) -> float | None:
    """Return `value`, or None for an infinity or NaN, which JSON cannot hold."""
    """Return `value`, or None for an infinity or NaN, which JSON cannot hold."""
    return value if value is not None and math.isfinite(value) else None
