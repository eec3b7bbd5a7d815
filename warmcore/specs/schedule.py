"""Learning rate as a fraction of the peak, by pure functions of the step (METHOD §4).

Step i is 0-based. A phase of T steps uses the T interior points t = 1..T of [0, T + 1]: the rate
is above 0 at the first step and at the last.

`rewarm` is for training that continues from trained weights, for example after growth. These
weights come from the end of a schedule: the rate had decayed to a small value there. That rate is
too small for them now, and a jump to the peak is too large.
"""

import math

from warmcore.specs.train import CooldownShape, TrainSpec


def lr_factor(step: int, num_steps: int, train: TrainSpec) -> float:
    """Return the factor of `train.lr` at the 0-based `step` of `num_steps`."""
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
            # Before t0 the argument t is 0 or negative, and the factor is 1.
            start = cooldown_start(num_steps, train)
            return cooldown(step + 1 - start, num_steps - start, train.cooldown)


def count_warmup_steps(num_steps: int, train: TrainSpec) -> int:
    """Return the steps of the warmup: as given, or the given fraction of the run, rounded up."""
    if train.warmup_steps is not None:
        return train.warmup_steps
    return math.ceil(train.warmup_fraction * num_steps)


def cooldown_start(num_steps: int, train: TrainSpec) -> int:
    """Return t0 = N - ceil(c N), the number of steps before WSD begins to cool down."""
    return num_steps - math.ceil(train.cooldown_fraction * num_steps)


def spread_evaluations(total: int, evaluations: int) -> list[int]:
    """Return evenly spaced steps 0 = k_0 < ... < k_E = total; fewer if `total` is below E."""
    # 10 evaluations of 4 steps: the rounded steps repeat, and 0, 1, 2, 3, 4 are left.
    return sorted({round(k * total / evaluations) for k in range(evaluations + 1)})


def warmup(t: int, num_steps: int) -> float:
    """Return t / T, the linear warmup: 1 at its last step."""
    return t / num_steps


def cosine(t: int, num_steps: int) -> float:
    """Return (1 + cos(pi t / (T + 1))) / 2: arXiv 1608.03983 without restarts."""
    return (1 + math.cos(math.pi * t / (num_steps + 1))) / 2


def rewarm(factor: float, floor: float) -> float:
    """Return f0 + (1 - f0) f for a floor f0 and a factor f of warmup and cosine; arXiv 2308.04014.

    The rate rises linearly from the floor to the peak, then returns to the floor.
    """
    return floor + (1 - floor) * factor


def cooldown(t: int, num_steps: int, shape: CooldownShape) -> float:
    """Return 1 - x or 1 - sqrt(x) at x = t / (T + 1), and 1 before t = 1; arXiv 2405.18392."""
    if t <= 0:
        return 1.0
    x = t / (num_steps + 1)
    match shape:
        case "linear":
            return 1 - x
        case "1-sqrt":
            return 1 - math.sqrt(x)
