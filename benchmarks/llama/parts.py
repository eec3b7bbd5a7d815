"""Parts of a train step's time: matrix products alone, attention, and everything remaining."""

import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch.profiler import ProfilerActivity, profile

from warmcore.specs import ModelSpec


def measure_parts(step: Callable[[], float], spec: ModelSpec, *, rows: int) -> dict[str, float]:
    """Return CPU milliseconds: the step, its products alone, attention, and the remaining time."""
    whole = time_cpu(step)
    products = sum(count * ms for count, ms in time_products(spec, rows))
    attention = time_attention(step)
    size = sum(count * num_in * num_out for count, num_in, num_out in list_matrices(spec))
    return {
        "whole step": whole,
        "its matrix products alone": products,
        "attention": attention,
        "all else": whole - products - attention,
        "GFLOP/s of the products": 6 * rows * size / products / 1e6,
    }


def list_matrices(spec: ModelSpec) -> Iterator[tuple[int, int, int]]:
    """Yield (count, inputs, outputs) of every matrix that multiplies activations."""
    yield 2 * spec.depth, spec.width, spec.width
    yield 2 * spec.depth, spec.width, spec.kv_width
    yield 2 * spec.depth, spec.width, spec.ffn_width
    yield spec.depth, spec.ffn_width, spec.width
    yield 1, spec.width, spec.vocab_size


def time_products(spec: ModelSpec, rows: int) -> Iterator[tuple[int, float]]:
    """Yield (count, milliseconds) of y = x W^T, dx = dy W and dW = dy^T x for every matrix."""
    for count, num_in, num_out in list_matrices(spec):
        x, w, dy = (
            torch.randn(rows, num_in),
            torch.randn(num_out, num_in),
            torch.randn(rows, num_out),
        )
        # The forward product, the gradient of the input, and the gradient of the weight.
        for a, b in ((x, w.t()), (dy, w), (dy.t(), x)):
            out = torch.empty(len(a), b.shape[1])
            yield count, time_cpu(torch.mm, a, b, out=out)


def time_attention(step: Callable[[], float]) -> float:
    """Return milliseconds of self time in the attention kernels, forward and backward."""
    with profile(activities=[ProfilerActivity.CPU]) as measured:
        step()
    events = measured.key_averages()
    return sum(e.self_cpu_time_total for e in events if "scaled_dot_product" in e.key) / 1e3


def time_cpu(call: Callable[..., object], *args: object, **options: object) -> float:
    """Return the median CPU milliseconds of a call, independent of other processes."""
    # The first call warms the caches and is not counted.
    call(*args, **options)
    times: list[float] = []
    for _ in range(15):
        start = time.process_time()
        call(*args, **options)
        times.append(1e3 * (time.process_time() - start))
    return statistics.median(times)
