"""When a run is lost: pure, and its state is part of a checkpoint."""

import math

from warmcore.spec import NonNegativeInt, Spec

# Batches differ by a few hundredths of a nat: a run that merely learns nothing is not divergent.
MARGIN_NATS = 0.1


class LossWatch(Spec):
    """Steps in a row with a loss above the ceiling: the start of the run, or of knowing nothing.

    ceiling = max(first loss, ln V) + margin. A warm start begins far below ln V and may lose some
    of that while its learning rate warms up again; it stays below the ceiling.
    """

    ceiling_nats: float | None = None
    num_above: NonNegativeInt = 0

    def after(self, loss_nats: float, vocab_size: int) -> "LossWatch":
        """Return the watch after one more training loss."""
        ceiling = self.ceiling_nats
        if ceiling is None:
            ceiling = max(loss_nats, math.log(vocab_size)) + MARGIN_NATS
        num_above = self.num_above + 1 if loss_nats > ceiling else 0
        return LossWatch(ceiling_nats=ceiling, num_above=num_above)


def why_diverged(watch: LossWatch, num_steps: int) -> str | None:
    """Say why when the loss stayed above the ceiling for max(20, 10 % of the run's steps)."""
    patience = max(20, math.ceil(0.1 * num_steps))
    if watch.num_above < patience:
        return None
    return f"loss above {watch.ceiling_nats:.3f} nats, its start, for {patience} steps in a row"


def why_broken(loss_nats: float, grad_norm: float) -> str | None:
    """Say why when a step's numbers are not finite."""
    if not math.isfinite(loss_nats):
        return f"loss is {loss_nats}"
    return None if math.isfinite(grad_norm) else f"gradient norm is {grad_norm}"
