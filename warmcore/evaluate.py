"""Validation loss on the fixed windows of a corpus."""

import torch

from warmcore.batches import read_windows, val_windows
from warmcore.data import Tokens
from warmcore.model import Decoder, loss_nats
from warmcore.objective import LossFunction

# Tokens per forward pass: small enough that a small model's activations stay in the cache.
BATCH_TOKENS = 4096


@torch.no_grad()
def val_loss_nats(
    model: Decoder,
    tokens: Tokens,
    *,
    context: int,
    eval_tokens: int,
    loss_of: LossFunction = loss_nats,
) -> float:
    """Mean loss per token over `val_windows`, in nats."""
    windows = val_windows(tokens, context=context, eval_tokens=eval_tokens)
    batch_size = max(1, BATCH_TOKENS // context)
    total = 0.0
    for first in range(0, len(windows), batch_size):
        batch = windows[first : first + batch_size]
        loss = loss_of(model, read_windows(tokens, batch, context).to(model.device))
        total += loss.item() * len(batch)
    return total / len(windows)
