"""Validation loss on the fixed windows of a corpus."""

import torch

from warmcore.corpus.prepare import Tokens
from warmcore.model.decoder import Decoder, loss_nats
from warmcore.training.batches import choose_val_windows, read_windows
from warmcore.training.loss import LossFunction
from warmcore.training.ranks import ALONE, Ranks

# Tokens per forward pass. The activations of a small model then stay in the CPU's cache.
BATCH_TOKENS = 4096


@torch.no_grad()
def val_loss_nats(
    model: Decoder,
    tokens: Tokens,
    *,
    context: int,
    eval_tokens: int,
    loss_of: LossFunction = loss_nats,
    ranks: Ranks = ALONE,
) -> float:
    """Return the mean loss per token over the fixed windows, in nats.

    Ranks take the batches in turn: of five batches, rank 0 of two takes batches 0, 2 and 4.
    """
    windows = choose_val_windows(tokens, context=context, eval_tokens=eval_tokens)
    batch_size = max(1, BATCH_TOKENS // context)
    starts = range(0, len(windows), batch_size)
    total = 0.0
    for turn in range(0, len(starts), ranks.size):
        # In the last turn some ranks have no batch left. They repeat the last batch and drop its
        # loss: under FSDP every forward pass gathers shards, and all ranks must take part.
        our_batch = turn + ranks.rank
        first = starts[min(our_batch, len(starts) - 1)]
        batch = windows[first : first + batch_size]
        loss = loss_of(model, read_windows(tokens, batch, context).to(model.device))
        total += loss.item() * len(batch) if our_batch < len(starts) else 0.0
    return ranks.sum_over_ranks(torch.tensor(total, dtype=torch.float64)).item() / len(windows)
