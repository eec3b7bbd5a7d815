"""Arithmetic for results: any finite losses, however large, give numbers that JSON can hold.

A result beyond the largest float becomes that float.
"""

import sys
from collections.abc import Sequence
from math import copysign, frexp, ldexp
from statistics import fmean, stdev
from typing import TypeVar

T = TypeVar("T")
_MOST = sys.float_info.max


def clamp_to_finite(value: float) -> float:
    """Return the nearest finite number."""
    return max(-_MOST, min(_MOST, value))


# Losses come from workers, and a worker may report 1e308: two of them have no finite sum.
# Every value is divided by a power of two first, and the result is multiplied back. For example
# [1e308, 1.5e308] becomes [0.56, 0.83] at exponent 1024. A power of two changes no bit of a
# mantissa: for losses of ordinary size the result equals the direct computation bit for bit.
def mean(values: Sequence[float]) -> float:
    """Return the mean of finite numbers; their sum may overflow."""
    exponent = _largest_exponent(values)
    return _multiply_back(fmean(ldexp(v, -exponent) for v in values), exponent)


def standard_error(values: Sequence[float]) -> float:
    """Return the standard error of the mean, `stdev / sqrt(n)`, of at least two finite numbers.

    The squares of the numbers may overflow.
    """
    exponent = _largest_exponent(values)
    scaled = stdev([ldexp(v, -exponent) for v in values]) / len(values) ** 0.5
    return _multiply_back(scaled, exponent)


def _largest_exponent(values: Sequence[float]) -> int:
    return frexp(max(map(abs, values)))[1]


def _multiply_back(value: float, exponent: int) -> float:
    try:
        return ldexp(value, exponent)
    except OverflowError:
        return copysign(_MOST, value)


def fraction_between(start: float, point: float, end: float) -> float:
    """Return the fraction of the way from `start` to `end` at which `point` lies: 0 to 1."""
    whole = (start - point, start - end)
    # Subtract halves where the difference of the ends overflows: 1e308 - (-1e308) is infinite.
    halves = (start / 2 - point / 2, start / 2 - end / 2)
    part, way = halves if abs(whole[1]) > _MOST else whole
    return part / way


def thin_points(points: Sequence[T], most: int) -> Sequence[T]:
    """Return at most `most` of the points, evenly spaced; the last point is always kept."""
    stride = -(-len(points) // most) or 1
    # Count back from the last point: of 10 points, `most=4` has stride 3 and keeps 0, 3, 6 and 9.
    return points[(len(points) - 1) % stride :: stride]
