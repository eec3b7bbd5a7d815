"""Batches and validation windows as pure functions of the seed and the step."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from warmcore.training.batches import (
    choose_val_windows,
    count_windows,
    epoch_order,
    read_train_batch,
    read_windows,
)

sizes = st.integers(1, 8)
contexts = st.integers(2, 9)


def corpus_of(num_windows, context):
    """Return tokens that equal their position; windows begin at multiples of the context."""
    return np.arange(num_windows * context + 1, dtype=np.uint16)


@given(st.integers(1, 40), contexts, sizes, st.integers(0, 2**63 - 1))
def test_each_epoch_reads_every_window_exactly_once(num_windows, context, batch_size, seed):
    tokens = corpus_of(num_windows, context)
    num_epochs = 2
    num_steps = -(-num_epochs * num_windows // batch_size)
    rows = torch.cat(
        [
            read_train_batch(tokens, seed=seed, step=step, batch_size=batch_size, context=context)
            for step in range(num_steps)
        ]
    )
    for epoch in range(num_epochs):
        firsts = rows[epoch * num_windows : (epoch + 1) * num_windows, 0]
        assert sorted(firsts.tolist()) == [w * context for w in range(num_windows)]


@given(st.integers(1, 40), contexts, sizes, st.integers(0, 10**9))
def test_a_batch_is_a_function_of_the_step_alone(num_windows, context, batch_size, step):
    tokens = corpus_of(num_windows, context)
    keywords = {"seed": 3, "batch_size": batch_size, "context": context}
    once = read_train_batch(tokens, step=step, **keywords)
    # Neither the cache nor an earlier call may influence a batch.
    epoch_order.cache_clear()
    read_train_batch(tokens, step=step + 1, **keywords)
    assert torch.equal(once, read_train_batch(tokens, step=step, **keywords))
    assert once.shape == (batch_size, context + 1)


@given(st.integers(1, 30), contexts)
def test_a_window_is_contiguous_and_ends_with_the_next_windows_first_token(num_windows, context):
    tokens = corpus_of(num_windows, context)
    rows = read_windows(tokens, np.arange(num_windows), context)
    assert torch.equal(rows[:, 1:], rows[:, :-1] + 1)
    assert torch.equal(rows[1:, 0], rows[:-1, -1])
    assert rows[-1, -1] == len(tokens) - 1


def test_order_changes_with_seed_and_epoch():
    orders = {tuple(epoch_order(50, seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}
    assert len(orders) == 4


def test_a_batch_larger_than_the_corpus_runs_on_into_later_epochs():
    rows = read_train_batch(corpus_of(3, 4), seed=0, step=0, batch_size=8, context=4)[:, 0]
    assert sorted(rows[:3].tolist()) == sorted(rows[3:6].tolist()) == [0, 4, 8]


@given(st.integers(1, 200), contexts, st.integers(1, 500))
def test_validation_windows_are_distinct_evenly_spaced_and_as_many_as_asked(
    num_windows, context, eval_tokens
):
    tokens = corpus_of(num_windows, context)
    windows = choose_val_windows(tokens, context=context, eval_tokens=eval_tokens)
    assert len(windows) == min(num_windows, max(1, eval_tokens // context))
    gaps = np.diff([*windows, num_windows])
    assert gaps.min() >= 1
    assert windows[0] == 0
    assert gaps.max() - gaps.min() <= 1
    assert windows[-1] < count_windows(tokens, context)
