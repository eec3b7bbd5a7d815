"""Learning rate over its peak, as pure functions of the step (METHOD §4).

Step i is 0-based. Each phase of T steps is read at the T interior points t = 1..T of [0, T + 1],
so that the first step trains already and the last one still does.

`rewarm` is for training that continues from trained weights, such as a warm run after growth: they
come from the end of a schedule, where the rate had decayed, and neither that rate nor the peak at
once suits them.
"""

import math

from warmcore.specs.train import CooldownShape, TrainSpec


def lr_factor(step: int, num_steps: int, train: TrainSpec) -> float:
    """Factor of `train.lr` at 0-based `step` of `num_steps`."""
    factor = _factor_from_zero(step, num_steps, train)
    return rewarm(factor, train.lr_floor) if train.schedule == "rewarm" else factor


def _factor_from_zero(step: int, num_steps: int, train: TrainSpec) -> float:
    num_warmup = count_warmup_steps(num_steps, train)
    if step < num_warmup:
        return warmup(step + 1, num_warmup)
    match train.schedule:
        case "constant":
            return 1.0
        case "cosine" | "rewarm":
            return cosine(step + 1 - num_warmup, num_steps - num_warmup)
        case "wsd":
            start = cooldown_start(num_steps, train)
            return cooldown(step + 1 - start, num_steps - start, train.cooldown)


def count_warmup_steps(num_steps: int, train: TrainSpec) -> int:
    """Steps of the warmup: as given, else its fraction of the run, rounded up."""
    if train.warmup_steps is not None:
        return train.warmup_steps
    return math.ceil(train.warmup_fraction * num_steps)


def cooldown_start(num_steps: int, train: TrainSpec) -> int:
    """t0 = N - ceil(c N): the steps that are done when WSD begins to cool down."""
    return num_steps - math.ceil(train.cooldown_fraction * num_steps)


def spread_evaluations(total: int, evaluations: int) -> list[int]:
    """Steps 0 = k_0 < ... < k_E = total, evenly spaced; fewer when there are fewer steps."""
    return sorted({round(k * total / evaluations) for k in range(evaluations + 1)})


def warmup(t: int, num_steps: int) -> float:
    """Linear, t / T: full at the last step of the warmup."""
    return t / num_steps


def cosine(t: int, num_steps: int) -> float:
    """(1 + cos(pi t / (T + 1))) / 2, arXiv 1608.03983 without restarts."""
    return (1 + math.cos(math.pi * t / (num_steps + 1))) / 2


def rewarm(factor: float, floor: float) -> float:
    """f0 + (1 - f0) f, with f0 the floor and f linear warmup and cosine decay; arXiv 2308.04014.

    So the rate rises linearly from the floor to the peak and returns to the floor.
    """
    return floor + (1 - floor) * factor


def cooldown(t: int, num_steps: int, shape: CooldownShape) -> float:
    """1 - x or 1 - sqrt(x) at x = t / (T + 1), and 1 before; arXiv 2405.18392."""
    if t <= 0:
        return 1.0
    x = t / (num_steps + 1)
    match shape:
        case "linear":
            return 1 - x
        case "1-sqrt":
            return 1 - math.sqrt(x)
