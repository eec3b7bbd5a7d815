"""One constant phase cooled down at several token budgets (METHOD §4; arXiv 2405.18392).

A WSD run of N steps begins to cool down at t0 = N - ceil(c N). Until there its learning rate does
not depend on N, if its warmup is the same number of steps. So runs of several budgets are one run
up to the smallest t0, all but one of them up to the next, and so on: the trunk, whose warmup is
that of the largest budget. Each budget's branch goes on from the trunk's checkpoint at its own t0
and is, from there, the run of that budget without a trunk, bit for bit on a CPU.
"""

from collections.abc import Sequence
from itertools import pairwise

from warmcore.flops import budget_steps, num_steps
from warmcore.schedule import cooldown_start, evaluation_steps, warmup_steps
from warmcore.spec import CheckpointRef, RunSpec

MAX_EVALUATIONS = 10_000


def branch_of(trunk: RunSpec, tokens_per_param: float, checkpoint: CheckpointRef | None) -> RunSpec:
    """The run of one of the trunk's budgets, from `checkpoint` (None: the same run, whole).

    Raises:
        ValueError: the trunk has no such budget.
    """
    if tokens_per_param not in trunk.branches:
        works = ", ".join(f"{budget:g}" for budget in trunk.branches) or "no budget at all"
        raise ValueError(f"has no branch at {tokens_per_param:g} tokens per parameter but {works}")
    budget = {
        "tokens_per_param": tokens_per_param,
        "warmup_steps": warmup_steps(budget_steps(trunk), trunk.train),
    }
    train = trunk.train.model_copy(update=budget)
    return trunk.model_copy(update={"train": train, "trunk": checkpoint, "branches": ()})


def branch_steps(trunk: RunSpec) -> tuple[int, ...]:
    """t0 of each of the trunk's budgets: where a checkpoint is taken and kept."""
    wholes = [branch_of(trunk, budget, None) for budget in trunk.branches]
    return tuple(cooldown_start(budget_steps(run), run.train) for run in wholes)


def start_step(run: RunSpec) -> int:
    """Steps that are done when the run begins: a branch's t0, else none."""
    return 0 if run.trunk is None else cooldown_start(budget_steps(run), run.train)


def evaluations_of(run: RunSpec) -> list[int]:
    """The steps at which a run is evaluated; a trunk where its branches are, and where they begin.

    So each branch finds the evaluations that it would have made itself on the way to its t0.
    """
    if not run.branches:
        return evaluation_steps(num_steps(run), run.train.evaluations)
    steps = set(branch_steps(run))
    for budget, start in zip(run.branches, branch_steps(run), strict=True):
        whole = branch_of(run, budget, None)
        steps |= {step for step in evaluations_of(whole) if step <= start}
    return sorted(steps)


def past_evaluations(
    branch: RunSpec, trunk: RunSpec, losses_nats: Sequence[float]
) -> tuple[float, ...]:
    """Those of the trunk's losses that the branch would have measured itself."""
    own = frozenset(evaluations_of(branch))
    by_step = zip(evaluations_of(trunk), losses_nats, strict=False)
    return tuple(loss for step, loss in by_step if step in own)


def check_phases(run: RunSpec) -> None:
    """Raise ValueError unless a warmup that is given in steps leaves room for the cooldown."""
    total, num_warmup = budget_steps(run), run.train.warmup_steps
    rest = cooldown_start(total, run.train) if run.train.schedule == "wsd" else total
    if num_warmup is not None and num_warmup > rest:
        raise ValueError(
            f"train.warmup_steps {num_warmup}: the run of {total} steps has {rest} before its "
            f"cooldown; {rest} or fewer work"
        )


def check_branches(trunk: RunSpec) -> None:
    """Raise ValueError unless each budget has a cooldown that starts at a step of its own."""
    _check_budgets(trunk.branches)
    train = trunk.train
    if trunk.trunk is not None:
        raise ValueError("a run that has a trunk is a branch itself; give one of the two")
    if train.num_tokens is not None:
        raise ValueError(f"train.num_tokens {train.num_tokens} is a budget too; leave it out")
    if train.schedule != "wsd" or not train.cooldown_fraction:
        raise ValueError(
            f"train.schedule {train.schedule} with cooldown_fraction {train.cooldown_fraction:g} "
            "cannot branch; wsd with a cooldown_fraction above 0 can"
        )
    if train.swa_fraction is not None and train.swa_fraction > train.cooldown_fraction:
        raise ValueError(
            f"train.swa_fraction {train.swa_fraction:g} would begin before the cooldown of its "
            f"branch; {train.cooldown_fraction:g} or less works"
        )
    if trunk.train.evaluations * len(trunk.branches) > MAX_EVALUATIONS:
        most = MAX_EVALUATIONS // len(trunk.branches)
        raise ValueError(f"train.evaluations {train.evaluations}: {most} at most for a trunk")
    _check_steps(trunk)


def _check_budgets(branches: Sequence[float]) -> None:
    if len(branches) == 1:
        raise ValueError(
            f"one budget needs no trunk; give two, or train.tokens_per_param {branches[0]:g}"
        )
    if any(a >= b for a, b in pairwise(branches)):
        works = ", ".join(f"{budget:g}" for budget in sorted(set(branches)))
        raise ValueError(f"budgets must ascend, none twice; [{works}] would")


def _check_steps(trunk: RunSpec) -> None:
    steps = branch_steps(trunk)
    num_warmup = warmup_steps(budget_steps(trunk), trunk.train)
    if steps[0] < max(1, num_warmup):
        raise ValueError(
            f"{trunk.branches[0]:g} tokens per parameter would cool down from step {steps[0]}, in "
            f"the warmup of {num_warmup} steps; a larger budget or a shorter warmup would work"
        )
    for (a, b), (x, y) in zip(pairwise(steps), pairwise(trunk.branches), strict=True):
        if a >= b:
            raise ValueError(
                f"{x:g} and {y:g} tokens per parameter would cool down from the same step {a}; "
                "budgets further apart, or a smaller train.batch_size, would work"
            )
