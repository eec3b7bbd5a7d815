"""Rules for divergence: pure functions of numbers that a checkpoint keeps."""

import math

from warmcore.checkpoint.progress import LossWatch


def explain_divergence(watch: LossWatch, num_steps: int) -> str | None:
    """Return the reason if the loss stayed above the ceiling for max(20, 10 % of the steps)."""
    # Example: a run of 1000 steps ends after 100 steps in a row above the ceiling, a run of 50
    # steps after 20. A single bad batch ends no run.
    patience = max(20, math.ceil(0.1 * num_steps))
    if watch.num_above < patience:
        return None
    return f"loss above {watch.ceiling_nats:.3f} nats, its start, for {patience} steps in a row"


def explain_broken_step(loss_nats: float, grad_norm: float) -> str | None:
    """Return the reason if the loss or the gradient norm of a step is not finite."""
    if not math.isfinite(loss_nats):
        return f"loss is {loss_nats}"
    return None if math.isfinite(grad_norm) else f"gradient norm is {grad_norm}"
