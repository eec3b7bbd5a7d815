"""Arithmetic that ends in numbers JSON has: any finite losses, however large, give finite results.

What is beyond the largest float is that float. Sums are taken of numbers scaled by a power of two,
which is exact: in the range of real losses every bit is what it would be without.
"""

import sys
from collections.abc import Sequence
from math import copysign, frexp, ldexp
from statistics import fmean, stdev
from typing import TypeVar

T = TypeVar("T")
_MOST = sys.float_info.max


def clamp_to_finite(value: float) -> float:
    """The nearest finite number."""
    return max(-_MOST, min(_MOST, value))


def mean(values: Sequence[float]) -> float:
    """The mean of finite numbers, whose sum need not be one."""
    scale = _scale(values)
    return _back(fmean(ldexp(v, -scale) for v in values), scale)


def standard_error(values: Sequence[float]) -> float:
    """Of the mean of at least two finite numbers, whose squares need not be finite."""
    scale = _scale(values)
    return _back(stdev([ldexp(v, -scale) for v in values]) / len(values) ** 0.5, scale)


def _scale(values: Sequence[float]) -> int:
    return frexp(max(map(abs, values)))[1]


def _back(value: float, scale: int) -> float:
    try:
        return ldexp(value, scale)
    except OverflowError:
        return copysign(_MOST, value)


def fraction_between(part_from: float, part_to: float, to: float) -> float:
    """How far `part_to` is on the way from `part_from` to `to`."""
    halves = (part_from / 2 - part_to / 2, part_from / 2 - to / 2)
    whole = (part_from - part_to, part_from - to)
    part, way = halves if abs(whole[1]) > _MOST else whole
    return part / way


def thin_points(points: Sequence[T], most: int) -> Sequence[T]:
    """At most `most` of the points, evenly spaced; the last one always."""
    stride = -(-len(points) // most) or 1
    return points[(len(points) - 1) % stride :: stride]
