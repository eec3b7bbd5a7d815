"""The schedule of faults, a pure function of the seed."""

import random
from dataclasses import dataclass
from typing import Literal, get_args

Kind = Literal[
    "kill-api",  # SIGKILL; started again
    "kill-fleet",  # SIGKILL; its Ray must end by itself; started again
    "kill-worker",  # SIGKILL of a Ray worker process in the middle of a run
    "kill-database",  # SIGKILL of every process of the server; started again
    "pause-worker",  # stopped past its lease, then continued: late writes must be refused
    "cut-connections",  # the next answers end in the middle
    "delay-connections",  # every answer is late for 4 s
    "fill-disk",  # no space for checkpoints, for 2 to 6 s
    "corrupt-checkpoint",  # a flipped bit in the newest, and SIGKILL of the run's process
]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A fault at a time on a victim; `share` in [0, 1) scales its length or its number of bytes."""

    at_seconds: float
    kind: Kind
    victim: int
    share: float


def plan_faults(
    seed: int, *, seconds: float, gap_seconds: float, kinds: tuple[Kind, ...] = KINDS
) -> list[Fault]:
    """Return every kind once a round, in random order, on average `gap_seconds` apart."""
    draw = random.Random(seed)  # noqa: S311 - a schedule, no secret
    faults: list[Fault] = []
    # Every kind draws its numbers, even a kind that is left out: `kinds` only filters the schedule.
    at = 0.0
    while True:
        for kind in draw.sample(KINDS, len(KINDS)):
            at += draw.uniform(0.5, 1.5) * gap_seconds
            fault = Fault(at_seconds=at, kind=kind, victim=draw.randrange(2), share=draw.random())
            if at >= seconds:
                return faults
            if kind in kinds:
                faults.append(fault)
