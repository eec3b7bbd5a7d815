"""Trunks and branches: runs of several token budgets that share a constant phase.

METHOD §4; arXiv 2405.18392. A WSD run of N steps begins to cool down at step t0 = N - ceil(c N),
with c the cooldown's fraction. Before t0 the learning rate does not depend on N, provided that the
warmup has the same number of steps. Runs of several budgets are therefore identical up to their t0.

Example with c = 0.2 and budgets of 50, 100 and 200 steps: t0 is 40, 80 and 160. The trunk trains
160 steps and leaves a checkpoint at each t0. The branches train steps 41 to 50, 81 to 100 and 161
to 200 from these checkpoints: 230 steps in all, in place of 350. Each branch is the run of its
budget without a trunk, bit for bit on a CPU. The warmup is that of the largest budget.

This module holds the rules, as functions of budgets, steps and a TrainSpec. `warmcore.specs.run`
applies them to a RunSpec: `make_branch` derives a branch from its trunk, and the validators of
`RunSpec` call the checks.
"""

from collections.abc import Collection, Sequence
from itertools import pairwise

from warmcore.specs.train import TrainSpec

MAX_EVALUATIONS = 10_000


def check_budgets(budgets: Sequence[float]) -> None:
    """Raise ValueError unless there are several budgets, in ascending order."""
    if len(budgets) == 1:
        raise ValueError(
            f"a single budget needs no trunk; give two, or train.tokens_per_param {budgets[0]:g}"
        )
    if any(a >= b for a, b in pairwise(budgets)):
        works = ", ".join(f"{budget:g}" for budget in sorted(set(budgets)))
        raise ValueError(f"budgets must ascend, none twice; [{works}] would")


def check_trunk_train(train: TrainSpec, num_budgets: int) -> None:
    """Raise ValueError unless a run that is trained like this can have branches."""
    if train.num_tokens is not None:
        raise ValueError(f"train.num_tokens {train.num_tokens} is a budget too; leave it out")
    if train.schedule != "wsd" or not train.cooldown_fraction:
        raise ValueError(
            f"train.schedule {train.schedule} with cooldown_fraction {train.cooldown_fraction:g} "
            "cannot branch; wsd with a cooldown_fraction above 0 can"
        )
    # Otherwise the average would begin in the trunk, which keeps no average for this branch.
    if train.swa_fraction is not None and train.swa_fraction > train.cooldown_fraction:
        raise ValueError(
            f"train.swa_fraction {train.swa_fraction:g} would begin before the cooldown of its "
            f"branch; {train.cooldown_fraction:g} or less works"
        )
    # A trunk is evaluated at the steps of all its branches.
    if train.evaluations * num_budgets > MAX_EVALUATIONS:
        most = MAX_EVALUATIONS // num_budgets
        raise ValueError(f"train.evaluations {train.evaluations}: {most} at most for a trunk")


def check_cooldown_starts(budgets: Sequence[float], starts: Sequence[int], num_warmup: int) -> None:
    """Raise ValueError unless each budget's cooldown starts at another step after the warmup.

    Args:
        budgets: Tokens per parameter, ascending.
        starts: t0 of each budget, in steps.
        num_warmup: Steps of the trunk's warmup.
    """
    if starts[0] < max(1, num_warmup):
        raise ValueError(
            f"{budgets[0]:g} tokens per parameter would cool down from step {starts[0]}, in "
            f"the warmup of {num_warmup} steps; a larger budget or a shorter warmup would work"
        )
    for (a, b), (x, y) in zip(pairwise(starts), pairwise(budgets), strict=True):
        if a >= b:
            raise ValueError(
                f"{x:g} and {y:g} tokens per parameter would cool down from the same step {a}; "
                "budgets further apart, or a smaller train.batch_size, would work"
            )


def select_branch_losses(
    losses_nats: Sequence[float], trunk_steps: Sequence[int], branch_steps: Collection[int]
) -> tuple[float, ...]:
    """Return the losses of the trunk that the branch would have measured itself.

    Args:
        losses_nats: Validation losses of the trunk up to the branch's t0.
        trunk_steps: Steps at which the trunk is evaluated; at least as many as losses.
        branch_steps: Steps at which the branch is evaluated.
    """
    by_step = zip(trunk_steps, losses_nats, strict=False)
    return tuple(loss for step, loss in by_step if step in branch_steps)
