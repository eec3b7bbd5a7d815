"""A target of several token budgets: a trunk, and a run for each cooldown. Pure."""

from collections.abc import Mapping
from typing import Any

from service.specs.search_space import Dimension
from warmcore.specs import RunSpec
from warmcore.specs.fields import FieldError, reason
from warmcore.specs.run import (
    branch_of,
)
from warmcore.specs.schedule import warmup_steps

# Where a cooldown begins is rounded to whole steps, so what is tuned may bring two of them nearer
# by two steps than they are at the ends of its range.
MIN_STEPS_APART = 4
_TUNED = ("batch_size", "warmup_fraction", "cooldown_fraction")
_BUDGET_FIELDS = ("tokens_per_param", "num_tokens")


def make_trunk(run: RunSpec, budgets: tuple[float, ...]) -> RunSpec:
    """`run` as the trunk of these budgets; itself where there are none.

    Raises:
        ValueError: they cannot share a trunk.
    """
    if not budgets:
        return run
    own = {"num_tokens": None, "tokens_per_param": budgets[-1]}
    train = run.train.model_copy(update=own)
    return RunSpec.model_validate(dict(run) | {"train": train, "branches": budgets})


def count_flops_with_branches(run: RunSpec) -> float:
    """What a target costs in all: its own training, and each cooldown that follows it."""
    wholes = [branch_of(run, budget, None) for budget in run.branches]
    steps = [whole.budget_steps for whole in wholes]
    cooldowns = sum(n - start for n, start in zip(steps, run.branch_steps, strict=True))
    return run.flops_of((run.num_steps + cooldowns) * run.tokens_per_step)


def check_no_other_budget(budgets: tuple[float, ...], train: Mapping[str, Any], place: str) -> None:
    """Raise a FieldError where a target of several budgets is given one more."""
    for name in _BUDGET_FIELDS:
        if budgets and name in train:
            message = f"{place}.budgets say how long it trains; leave one of the two out"
            raise FieldError(f"{place}.train.{name}", train[name], message)


def check_longest_phases(run: RunSpec, tuned: Mapping[str, Dimension], place: str) -> None:
    """Raise a FieldError unless the phases fit when the search makes each as long as it may."""
    corner = {name: max(tuned[name].bounds) for name in _TUNED if name in tuned}
    try:
        run.with_params(corner)
    except ValueError as error:
        raise FieldError(place, str(corner), reason(error)) from None


def check_trunk(
    run: RunSpec, budgets: tuple[float, ...], tuned: Mapping[str, Dimension], place: str
) -> None:
    """Raise a FieldError unless `run` can be a trunk whatever the search finds."""
    ends = {name: tuned[name].bounds for name in _TUNED if name in tuned}
    for pick in (max, min):
        corner = {name: pick(bounds) for name, bounds in ends.items()}
        try:
            at = make_trunk(run.with_params(corner), budgets)
            if corner:
                _check_room(at)
        except ValueError as error:
            where = ", ".join(f"{name} {value:g}" for name, value in corner.items())
            message = reason(error) + (f" (at {where}, which may be found)" if where else "")
            raise FieldError(f"{place}.budgets", list(budgets), message) from None


def _check_room(trunk: RunSpec) -> None:
    before = warmup_steps(trunk.budget_steps, trunk.train)
    for step, budget in zip(trunk.branch_steps, trunk.branches, strict=True):
        if step - before < MIN_STEPS_APART:
            raise ValueError(
                f"{budget:g} tokens per parameter would cool down {step - before} steps after what "
                f"is before; {MIN_STEPS_APART} are needed"
            )
        before = step
