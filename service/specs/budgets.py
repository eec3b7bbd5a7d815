"""A target of several token budgets: a trunk, and a run for each cooldown. Pure.

The trunk trains at a constant learning rate up to the largest budget. For each budget a run leaves
the trunk and cools down, so that several budgets share most of their training.
"""

from collections.abc import Mapping
from typing import Any

from service.specs.search_space import Dimension
from warmcore.specs import RunSpec
from warmcore.specs.fields import FieldError, format_reason
from warmcore.specs.run import make_branch
from warmcore.specs.schedule import count_warmup_steps

# The first step of a cooldown is rounded to a whole step. Inside the range of a tuned parameter two
# cooldowns may therefore begin up to two steps nearer to each other than at its ends.
MIN_STEPS_APART = 4
_TUNED = ("batch_size", "warmup_fraction", "cooldown_fraction")
_BUDGET_FIELDS = ("tokens_per_param", "num_tokens")


def make_trunk(run: RunSpec, budgets: tuple[float, ...]) -> RunSpec:
    """Return `run` as the trunk of these budgets; without budgets return `run` itself.

    Raises:
        ValueError: the budgets cannot share a trunk.
    """
    if not budgets:
        return run
    own = {"num_tokens": None, "tokens_per_param": budgets[-1]}
    train = run.train.model_copy(update=own)
    return RunSpec.model_validate(dict(run) | {"train": train, "branches": budgets})


def count_flops_with_branches(run: RunSpec) -> float:
    """Return the training FLOPs of a target in all: its trunk and each cooldown that follows."""
    steps = [make_branch(run, budget, None).budget_steps for budget in run.branches]
    cooldowns = sum(n - start for n, start in zip(steps, run.branch_steps, strict=True))
    return run.count_flops((run.num_steps + cooldowns) * run.tokens_per_step)


def check_no_other_budget(
    budgets: tuple[float, ...], train: Mapping[str, Any], prefix: str
) -> None:
    """Raise a FieldError if a target of several budgets is given another length of training."""
    for name in _BUDGET_FIELDS:
        if budgets and name in train:
            message = f"{prefix}.budgets say how long it trains; leave one of the two out"
            raise FieldError(f"{prefix}.train.{name}", train[name], message)


def check_longest_phases(run: RunSpec, tuned: Mapping[str, Dimension], prefix: str) -> None:
    """Raise a FieldError unless warmup and cooldown fit together at their longest."""
    corner = {name: max(tuned[name].bounds) for name in _TUNED if name in tuned}
    try:
        run.with_params(corner)
    except ValueError as error:
        raise FieldError(prefix, str(corner), format_reason(error)) from None


def check_trunk(
    run: RunSpec, budgets: tuple[float, ...], tuned: Mapping[str, Dimension], prefix: str
) -> None:
    """Raise a FieldError unless `run` can be a trunk with every value that the search may find."""
    # The largest values leave the fewest steps between two cooldowns, the smallest may leave no
    # cooldown. Example: batch sizes 8 to 128 and cooldowns 0 to 0.5 are checked at (128, 0.5) and
    # at (8, 0).
    ends = {name: tuned[name].bounds for name in _TUNED if name in tuned}
    for pick in (max, min):
        corner = {name: pick(bounds) for name, bounds in ends.items()}
        try:
            at = make_trunk(run.with_params(corner), budgets)
            if corner:
                _check_room(at)
        except ValueError as error:
            where = ", ".join(f"{name} {value:g}" for name, value in corner.items())
            message = format_reason(error) + (
                f" (at {where}, in the search space)" if where else ""
            )
            raise FieldError(f"{prefix}.budgets", list(budgets), message) from None


def _check_room(trunk: RunSpec) -> None:
    before = count_warmup_steps(trunk.budget_steps, trunk.train)
    for step, budget in zip(trunk.branch_steps, trunk.branches, strict=True):
        if step - before < MIN_STEPS_APART:
            raise ValueError(
                f"{budget:g} tokens per parameter would cool down {step - before} steps after the "
                f"warmup or cooldown before it; {MIN_STEPS_APART} are needed"
            )
        before = step
