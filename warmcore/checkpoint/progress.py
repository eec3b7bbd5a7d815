"""Progress of a training run, kept in its checkpoints."""

import math

from warmcore.specs import NonNegativeInt, Spec

# Batches differ by a few hundredths of a nat. Without this margin a run that learns nothing, and
# stays at ln V, would count as diverged by chance.
MARGIN_NATS = 0.1


class LossWatch(Spec):
    """The number of steps in a row with a loss above the ceiling, and the ceiling.

    ceiling = max(first loss, ln V) + margin, in nats; ln V is the loss of a model that knows
    nothing. Example: V = 256 gives a ceiling of 5.545 + 0.1 nats, or more if the first loss is
    above ln V. A warm start begins far below ln V, and may lose much of that lead while its
    learning rate warms up again without reaching the ceiling.
    """

    ceiling_nats: float | None = None
    num_above: NonNegativeInt = 0

    def with_loss(self, loss_nats: float, vocab_size: int) -> "LossWatch":
        """Return the watch after a further training loss."""
        ceiling = self.ceiling_nats
        if ceiling is None:
            ceiling = max(loss_nats, math.log(vocab_size)) + MARGIN_NATS
        num_above = self.num_above + 1 if loss_nats > ceiling else 0
        return LossWatch(ceiling_nats=ceiling, num_above=num_above)


class Progress(Spec):
    """The state of a run besides its tensors."""

    step: NonNegativeInt = 0
    val_losses_nats: tuple[float, ...] = ()
    watch: LossWatch = LossWatch()
