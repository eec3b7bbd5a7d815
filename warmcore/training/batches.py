"""The windows that a step reads: pure functions of the seed and the step, without saved state.

A window is context + 1 tokens, at stride context. Every epoch visits each window once, in a new
order.

Shapes: B batch, T context.
"""

# Shapes by suffix need capitals in names.
# ruff: noqa: N803, N806

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from warmcore.corpus.prepare import Tokens

Windows = NDArray[np.int64]


def read_train_batch(
    tokens: Tokens, *, seed: int, step: int, batch_size: int, context: int
) -> Tensor:
    """Return the windows [B, T + 1] of 0-based `step`; a batch may run on into later epochs."""
    # Example: 10 windows and batches of 4. Step 2 reads places 8 to 11 of the endless sequence of
    # epochs: the last two windows of epoch 0 and the first two of epoch 1.
    num_windows = count_windows(tokens, context)
    first, last = step * batch_size, (step + 1) * batch_size
    windows_B = np.concatenate(
        [
            epoch_order(num_windows, seed, epoch)[
                max(0, first - epoch * num_windows) : last - epoch * num_windows
            ]
            for epoch in range(first // num_windows, (last - 1) // num_windows + 1)
        ]
    )
    return read_windows(tokens, windows_B, context)


@lru_cache(maxsize=2)
def epoch_order(num_windows: int, seed: int, epoch: int) -> Windows:
    """Return an epoch's permutation of the windows."""
    # Cached: drawing takes 0.3 s for the 8 million windows of 1e9 tokens at context 128.
    return np.random.default_rng((seed, epoch)).permutation(num_windows)


def choose_val_windows(tokens: Tokens, *, context: int, eval_tokens: int) -> Windows:
    """Return the fixed windows of validation, evenly spaced: about `eval_tokens` tokens, or all."""
    num_windows = count_windows(tokens, context)
    num_used = min(num_windows, max(1, eval_tokens // context))
    return np.arange(num_used) * num_windows // num_used


def count_windows(tokens: Tokens, context: int) -> int:
    """Return the number of whole windows, each with the token after it."""
    return (len(tokens) - 1) // context


def read_windows(tokens: Tokens, windows_B: Windows, context: int) -> Tensor:
    """Copy windows [B, T + 1] from the memory map."""
    starts_B1 = windows_B[:, None] * context
    return torch.from_numpy(tokens[starts_B1 + np.arange(context + 1)].astype(np.int64))
