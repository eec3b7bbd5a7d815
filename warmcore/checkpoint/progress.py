"""Progress of a training run, as a checkpoint keeps it."""

import math

from warmcore.specs import NonNegativeInt, Spec

# Batches differ by a few hundredths of a nat: a run that merely learns nothing is not divergent.
MARGIN_NATS = 0.1


class LossWatch(Spec):
    """Steps in a row with a loss above the ceiling: the start of the run, or of knowing nothing.

    ceiling = max(first loss, ln V) + margin. A warm start begins far below ln V and may lose some
    of that while its learning rate warms up again; it stays below the ceiling.
    """

    ceiling_nats: float | None = None
    num_above: NonNegativeInt = 0

    def with_loss(self, loss_nats: float, vocab_size: int) -> "LossWatch":
        """Return the watch after one more training loss."""
        ceiling = self.ceiling_nats
        if ceiling is None:
            ceiling = max(loss_nats, math.log(vocab_size)) + MARGIN_NATS
        num_above = self.num_above + 1 if loss_nats > ceiling else 0
        return LossWatch(ceiling_nats=ceiling, num_above=num_above)


class Progress(Spec):
    """What a run carries from step to step, besides tensors."""

    step: NonNegativeInt = 0
    val_losses_nats: tuple[float, ...] = ()
    watch: LossWatch = LossWatch()
