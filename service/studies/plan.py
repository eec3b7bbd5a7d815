"""The next step of a study: a pure function of its spec and of the runs that have finished."""

from dataclasses import dataclass
from typing import Any

from service.lifecycle import FINAL_RUN_STATES
from service.protocol import Arm, RunState
from service.specs.budgets import make_trunk
from service.specs.study import StudySpec
from service.specs.target import TargetSpec, WarmstartSpec
from warmcore.specs import CheckpointRef, GrowthSpec, ModelSpec, RunSpec, TrainSpec, derive_seed

_NO_TRIAL = "no trial succeeded"


@dataclass(frozen=True, kw_only=True)
class Base:
    """A checkpoint to grow, and the hyperparameters to train with."""

    checkpoint_id: int | None  # None: an imported model
    checkpoint: CheckpointRef
    params: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class TargetFact:
    """A target run; once it has succeeded, `base` is its own final checkpoint.

    For a target of several budgets the trunk has `branch` 0; the cooldowns count from 1.
    """

    rung: int
    arm: Arm
    seed: int
    branch: int
    state: RunState
    base: Base | None


@dataclass(frozen=True, kw_only=True)
class NewTarget:
    """A target run to enqueue. A cold run has no base."""

    rung: int
    arm: Arm
    seed: int
    params: dict[str, Any]
    base: Base | None


@dataclass(frozen=True, kw_only=True)
class End:
    """The end of a study."""

    state: str
    reason: str | None = None


def derive_target_seeds(study_seed: int, count: int) -> tuple[int, ...]:
    """Return one seed for each pair of a warm and a cold run.

    The two share it: they train on the same data in the same order, and their difference is that
    of the initial weights alone.
    """
    return tuple(derive_seed(study_seed, "target", k) for k in range(count))


def plan_next_step(
    spec: StudySpec, best: Base | None, targets: tuple[TargetFact, ...], *, any_succeeded: bool
) -> tuple[NewTarget, ...] | End | None:
    """Return the targets to enqueue, the study's end, or None to wait for runs.

    Called once every trial has finished. Rung 0 grows from the best trial, rung r from the warm
    run of rung r-1 with the same seed. Only the last rung has cold runs, since the verdict
    compares that rung. For a target of several budgets this enqueues the trunks; their branches
    follow when the trunks publish (`studies.branches`).
    """
    # Example: a ladder of widths 128 and 256, two seeds, with control.
    #   no targets yet                  enqueue rung 0 warm (2 runs) and rung 1 cold (2 runs)
    #   seed 0 of rung 0 succeeds       enqueue rung 1 warm for seed 0
    #   seed 1 of rung 0 fails          nothing grows from it: None, wait
    #   the last run of rung 1 ends     completed, if any run of rung 1 succeeded
    # Without a target the search is all that the study has to do.
    if not spec.rungs:
        return End(state="completed") if any_succeeded else End(state="failed", reason=_NO_TRIAL)
    if best is None:
        return End(state="failed", reason=f"{_NO_TRIAL} with a checkpoint to grow from")
    existing = {(t.rung, t.arm, t.seed) for t in targets}
    wanted = [*_plan_cold(spec, best), *_plan_warm(spec, best, targets)]
    missing = tuple(t for t in wanted if (t.rung, t.arm, t.seed) not in existing)
    if missing:
        return missing
    if any(t.state not in FINAL_RUN_STATES for t in targets):
        return None
    # Trunks of several budgets have no verdict of their own: their branches are compared.
    last = len(spec.rungs) - 1
    judged = [t for t in targets if t.rung == last and (t.branch > 0) == bool(spec.budgets)]
    if any(t.state == "succeeded" for t in judged):
        return End(state="completed")
    return End(state="failed", reason="no target run succeeded")


def _plan_cold(spec: StudySpec, best: Base) -> list[NewTarget]:
    if not spec.warmstart.control:
        return []
    last = len(spec.rungs) - 1
    seeds = derive_target_seeds(spec.hpo.seed, spec.warmstart.seeds)
    return [NewTarget(rung=last, arm="cold", seed=s, params=best.params, base=None) for s in seeds]


def _plan_warm(spec: StudySpec, best: Base, targets: tuple[TargetFact, ...]) -> list[NewTarget]:
    seeds = derive_target_seeds(spec.hpo.seed, spec.warmstart.seeds)
    wanted = [NewTarget(rung=0, arm="warm", seed=s, params=best.params, base=best) for s in seeds]
    bases = {(t.rung, t.seed): t.base for t in targets if t.arm == "warm" and t.base is not None}
    for (rung, seed), base in bases.items():
        if rung + 1 < len(spec.rungs):
            wanted.append(
                NewTarget(rung=rung + 1, arm="warm", seed=seed, params=best.params, base=base)
            )
    return wanted


def make_target_run(
    spec: StudySpec,
    model: ModelSpec,
    target: TargetSpec,
    new: NewTarget,
    warmstart: WarmstartSpec,
) -> RunSpec:
    """Return a target's run: the study's train spec, the tuned parameters, the target's overrides.

    An override that the user wrote for the target takes precedence over the tuned value. For
    several budgets the run is their trunk.

    Raises:
        ValueError: the budgets cannot share a trunk.
    """
    # Example: the search found batch_size 8 and lr 0.01; a target with train {batch_size: 16}
    # trains with batch_size 16 and lr 0.01.
    params = {name: value for name, value in new.params.items() if name not in target.train}
    run = RunSpec(model=model, data=spec.data, train=spec.train, seed=new.seed).with_params(params)
    train = TrainSpec.model_validate(run.train.model_dump() | target.train)
    run = run.model_copy(update={"train": train, "growth": _make_growth(new, warmstart)})
    return make_trunk(run, target.budgets)


def _make_growth(new: NewTarget, warmstart: WarmstartSpec) -> GrowthSpec | None:
    if new.base is None:
        return None
    options = warmstart.model_dump(exclude={"control", "seeds"})
    return GrowthSpec.model_validate(options | {"base": new.base.checkpoint})
