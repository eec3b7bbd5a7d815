"""Events of a training run: a step, an evaluation, a divergence."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class StepEvent:
    """`step` steps are done; the loss and the gradient norm before the last one's update."""

    step: int
    tokens: int
    loss_nats: float
    lr: float
    grad_norm: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class EvaluationEvent:
    """Evaluation number `evaluation`, after `step` steps; number 0 precedes training.

    `val_loss_nats` is of the weights themselves, the others of averages that have begun.
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
    """The run ended after `step` good steps; the step that showed it was not applied."""

    step: int
    tokens: int
    reason: str


Event = StepEvent | EvaluationEvent | DivergedEvent
