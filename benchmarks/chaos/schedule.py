"""Which fault strikes when: a pure function of the seed."""

import random
from dataclasses import dataclass
from typing import Literal, get_args

Kind = Literal[
    "kill-api",  # -9; started again
    "kill-fleet",  # -9, and its Ray must die with it; started again
    "kill-worker",  # -9 of a Ray worker process in the middle of a run
    "kill-database",  # -9 of every process of the server; started again
    "pause-worker",  # stopped past its lease, then continued: what it writes late must be refused
    "cut-connections",  # the next answers break off in the middle
    "delay-connections",  # every answer is late for a while
    "fill-disk",  # not a byte more for checkpoints, for a while
    "corrupt-checkpoint",  # one bit of the newest, and the run's process is killed
]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True, kw_only=True)
class Fault:
    """`share` in [0, 1) says how much of it: how long, after how many bytes."""

    at_seconds: float
    kind: Kind
    victim: int
    share: float


def plan(
    seed: int, *, seconds: float, gap_seconds: float, kinds: tuple[Kind, ...] = KINDS
) -> list[Fault]:
    """Every kind once in each round, in random order, `gap_seconds` apart on average."""
    draw = random.Random(seed)  # noqa: S311 - a schedule, no secret
    faults: list[Fault] = []
    at = 0.0
    while True:
        for kind in draw.sample(KINDS, len(KINDS)):
            at += draw.uniform(0.5, 1.5) * gap_seconds
            fault = Fault(at_seconds=at, kind=kind, victim=draw.randrange(2), share=draw.random())
            if at >= seconds:
                return faults
            if kind in kinds:
                faults.append(fault)
