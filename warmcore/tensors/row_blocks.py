"""Blocks of rows: large tensors are made, written and read a few rows at a time.

A block stays in the cache from the first number drawn to the last byte written, and its memory is
used again for the next. A whole tensor of 46 MB at once took 9.5 ns an element to shrink, pad and
perturb, a third of it for pages never touched before; in blocks it takes 3.
"""

import math
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

from torch import Tensor

BLOCK_ELEMENTS = 2**18  # 1 MB of float32
# `Tensor.normal_` draws 16 numbers at a time, and another way where there are fewer. So what is
# drawn block by block is what is drawn at once if blocks begin at multiples of 16 and none is less.
ALIGNMENT = 16
BLOCKS_AHEAD = 2


def split_rows(shape: Sequence[int]) -> list[slice]:
    """Split the first axis into blocks of about `BLOCK_ELEMENTS`, at multiples of 16 rows.

    The last block has 16 rows or more, unless it is the only one.
    """
    num_rows, row = shape[0], max(1, math.prod(shape[1:]))
    step = max(1, BLOCK_ELEMENTS // row // ALIGNMENT) * ALIGNMENT
    starts = [0, *range(step, num_rows - ALIGNMENT + 1, step)]
    return [slice(a, b) for a, b in pairwise([*starts, num_rows])]


def fill_from_blocks(tensors: Mapping[str, Tensor], blocks: Iterable[tuple[str, Tensor]]) -> None:
    """Copy blocks, which come in order, into the whole tensors of their names; all of them."""
    filled: Counter[str] = Counter()
    for name, block in blocks:
        start, end = filled[name], filled[name] + block.numel()
        tensors[name].view(-1)[start:end].copy_(block.view(-1))
        filled[name] = end
    assert filled == {name: tensor.numel() for name, tensor in tensors.items()}


def make_ahead(blocks: Iterator[Tensor | None]) -> Iterator[Tensor | None]:
    """Make blocks in a thread, a few before they are taken; None after the last."""
    with ThreadPoolExecutor(1) as pool:
        pending = deque(pool.submit(next, blocks, None) for _ in range(BLOCKS_AHEAD))
        while True:
            block = pending.popleft().result()
            pending.append(pool.submit(next, blocks, None))
            yield block
