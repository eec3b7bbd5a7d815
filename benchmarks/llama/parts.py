"""Where a train step's time goes: against its matrix products alone, timed in the same process."""

import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch.profiler import ProfilerActivity, profile

from warmcore.specs import ModelSpec


def parts(step: Callable[[], float], spec: ModelSpec, *, rows: int) -> dict[str, float]:
    """CPU milliseconds of a step: all of it, its products alone, attention, what remains."""
    whole = cpu_ms(step)
    products = sum(count * ms for count, ms in products_ms(spec, rows))
    attention = attention_ms(step)
    size = sum(count * num_in * num_out for count, num_in, num_out in matrices(spec))
    return {
        "whole step": whole,
        "its matrix products alone": products,
        "attention": attention,
        "all else": whole - products - attention,
        "GFLOP/s of the products": 6 * rows * size / products / 1e6,
    }


def matrices(spec: ModelSpec) -> Iterator[tuple[int, int, int]]:
    """How often, inputs, outputs: of every matrix that multiplies activations."""
    yield 2 * spec.depth, spec.width, spec.width
    yield 2 * spec.depth, spec.width, spec.kv_width
    yield 2 * spec.depth, spec.width, spec.ffn_width
    yield spec.depth, spec.ffn_width, spec.width
    yield 1, spec.width, spec.vocab_size


def products_ms(spec: ModelSpec, rows: int) -> Iterator[tuple[int, float]]:
    """y = x W^T, dx = dy W and dW = dy^T x of every matrix, in memory that is warm."""
    for count, num_in, num_out in matrices(spec):
        x, w, dy = (
            torch.randn(rows, num_in),
            torch.randn(num_out, num_in),
            torch.randn(rows, num_out),
        )
        for a, b in ((x, w.t()), (dy, w), (dy.t(), x)):
            out = torch.empty(len(a), b.shape[1])
            yield count, cpu_ms(torch.mm, a, b, out=out)


def attention_ms(step: Callable[[], float]) -> float:
    """Self time of the attention kernels, forwards and backwards."""
    with profile(activities=[ProfilerActivity.CPU]) as measured:
        step()
    events = measured.key_averages()
    return sum(e.self_cpu_time_total for e in events if "scaled_dot_product" in e.key) / 1e3


def cpu_ms(call: Callable[..., object], *args: object, **options: object) -> float:
    """Median CPU time: what other processes take away does not count."""
    call(*args, **options)
    times: list[float] = []
    for _ in range(15):
        start = time.process_time()
        call(*args, **options)
        times.append(1e3 * (time.process_time() - start))
    return statistics.median(times)
