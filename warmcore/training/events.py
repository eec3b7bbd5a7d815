"""Events of a training run: a step, an evaluation, a divergence."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class StepEvent:
    """The end of step number `step`; the loss and the gradient norm are from before its update."""

    step: int
    tokens: int
    loss_nats: float
    lr: float
    grad_norm: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class EvaluationEvent:
    """Evaluation number `evaluation`, after `step` steps; number 0 precedes training.

    `val_loss_nats` is the loss of the raw weights, in nats per token. The other two are the losses
    of averages; None if the run has not this average or the average has not begun.
    """

    step: int
    tokens: int
    evaluation: int
    val_loss_nats: float
    ema_val_loss_nats: float | None = None
    swa_val_loss_nats: float | None = None
    seconds: float


@dataclass(frozen=True, kw_only=True)
class DivergedEvent:
    """The end of a run after `step` good steps; the step that diverged was not applied."""

    step: int
    tokens: int
    reason: str


Event = StepEvent | EvaluationEvent | DivergedEvent
