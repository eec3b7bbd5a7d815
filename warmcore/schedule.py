"""Learning rate over its peak, as pure functions of the step (METHOD §4).

Step i is 0-based. Each phase of T steps is read at the T interior points t = 1..T of [0, T + 1],
so that the first step trains already and the last one still does.
"""

import math

from warmcore.spec import CooldownShape, TrainSpec


def lr_factor(step: int, num_steps: int, train: TrainSpec) -> float:
    """Factor of `train.lr` at 0-based `step` of `num_steps`."""
    num_warmup = math.ceil(train.warmup_fraction * num_steps)
    if step < num_warmup:
        return warmup(step + 1, num_warmup)
    match train.schedule:
        case "constant":
            return 1.0
        case "cosine":
            return cosine(step + 1 - num_warmup, num_steps - num_warmup)
        case "wsd":
            num_cooldown = math.ceil(train.cooldown_fraction * num_steps)
            return cooldown(step + 1 - (num_steps - num_cooldown), num_cooldown, train.cooldown)


def warmup(t: int, num_steps: int) -> float:
    """Linear, t / T: full at the last step of the warmup."""
    return t / num_steps


def cosine(t: int, num_steps: int) -> float:
    """(1 + cos(pi t / (T + 1))) / 2, arXiv 1608.03983 without restarts."""
    return (1 + math.cos(math.pi * t / (num_steps + 1))) / 2


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
