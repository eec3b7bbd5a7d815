"""When a run is lost: pure, and its state is part of a checkpoint."""

import math

from warmcore.checkpoint.progress import LossWatch


def explain_divergence(watch: LossWatch, num_steps: int) -> str | None:
    """Say why when the loss stayed above the ceiling for max(20, 10 % of the run's steps)."""
    patience = max(20, math.ceil(0.1 * num_steps))
    if watch.num_above < patience:
        return None
    return f"loss above {watch.ceiling_nats:.3f} nats, its start, for {patience} steps in a row"


def explain_broken_step(loss_nats: float, grad_norm: float) -> str | None:
    """Say why when a step's numbers are not finite."""
    if not math.isfinite(loss_nats):
        return f"loss is {loss_nats}"
    return None if math.isfinite(grad_norm) else f"gradient norm is {grad_norm}"
