"""What a study does next, as a pure function of its spec and of what has finished."""

from dataclasses import dataclass
from typing import Any

from service.lifecycle import FINAL_RUN_STATES
from service.protocol import Arm, RunState
from service.specs.budgets import make_trunk
from service.specs.study import StudySpec
from service.specs.target import TargetSpec, WarmstartSpec
from warmcore.specs import CheckpointRef, GrowthSpec, ModelSpec, RunSpec, TrainSpec, derived_seed

_NONE = "no trial succeeded"


@dataclass(frozen=True, kw_only=True)
class Base:
    """What growth starts from, and the parameters to train with; None: it was imported."""

    checkpoint_id: int | None
    checkpoint: CheckpointRef
    params: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class TargetFact:
    """A target run as it stands; `base` is its own final checkpoint once it has succeeded.

    Of a target of several budgets the trunk is `branch` 0, and the cooldowns count from 1.
    """

    rung: int
    arm: Arm
    seed: int
    branch: int
    state: RunState
    base: Base | None


@dataclass(frozen=True, kw_only=True)
class NewTarget:
    """A target run to enqueue; a cold one starts from no base."""

    rung: int
    arm: Arm
    seed: int
    params: dict[str, Any]
    base: Base | None


@dataclass(frozen=True, kw_only=True)
class End:
    """The study is over."""

    state: str
    reason: str | None = None


def derive_target_seeds(study_seed: int, count: int) -> tuple[int, ...]:
    """One seed a pair: a warm and a cold run share it, so that they share the data order."""
    return tuple(derived_seed(study_seed, "target", k) for k in range(count))


def plan_next_step(
    spec: StudySpec, best: Base | None, targets: tuple[TargetFact, ...], *, any_succeeded: bool
) -> tuple[NewTarget, ...] | End | None:
    """Decide once every trial has finished: enqueue targets, end, or (None) wait for runs.

    Rung 0 grows from the best trial, rung r from rung r-1's warm run of the same seed. The cold
    control is of the last rung alone: that is what the verdict compares. Of several budgets the
    trunks are enqueued here, and their branches where the trunks publish (`studies.branches`).
    """
    if not spec.rungs:
        return End(state="completed") if any_succeeded else End(state="failed", reason=_NONE)
    if best is None:
        return End(state="failed", reason=f"{_NONE} with a checkpoint to grow from")
    known = {(t.rung, t.arm, t.seed) for t in targets}
    wanted = [*_cold(spec, best), *_warm(spec, best, targets)]
    missing = tuple(t for t in wanted if (t.rung, t.arm, t.seed) not in known)
    if missing:
        return missing
    if any(t.state not in FINAL_RUN_STATES for t in targets):
        return None
    last = len(spec.rungs) - 1
    judged = [t for t in targets if t.rung == last and (t.branch > 0) == bool(spec.budgets)]
    if any(t.state == "succeeded" for t in judged):
        return End(state="completed")
    return End(state="failed", reason="no target run succeeded")


def _cold(spec: StudySpec, best: Base) -> list[NewTarget]:
    if not spec.warmstart.control:
        return []
    last = len(spec.rungs) - 1
    seeds = derive_target_seeds(spec.hpo.seed, spec.warmstart.seeds)
    return [NewTarget(rung=last, arm="cold", seed=s, params=best.params, base=None) for s in seeds]


def _warm(spec: StudySpec, best: Base, targets: tuple[TargetFact, ...]) -> list[NewTarget]:
    seeds = derive_target_seeds(spec.hpo.seed, spec.warmstart.seeds)
    wanted = [NewTarget(rung=0, arm="warm", seed=s, params=best.params, base=best) for s in seeds]
    done = {(t.rung, t.seed): t.base for t in targets if t.arm == "warm" and t.base is not None}
    for (rung, seed), base in done.items():
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
    """The run of a target: the study's train spec, the tuned parameters, the target's overrides.

    What the user wrote for the target wins over what was tuned on the proxy. With several budgets
    it is their trunk.

    Raises:
        ValueError: the budgets cannot share one.
    """
    params = {name: value for name, value in new.params.items() if name not in target.train}
    run = RunSpec(model=model, data=spec.data, train=spec.train, seed=new.seed).with_params(params)
    train = TrainSpec.model_validate(run.train.model_dump() | target.train)
    run = run.model_copy(update={"train": train, "growth": _growth(new, warmstart)})
    return make_trunk(run, target.budgets)


def _growth(new: NewTarget, warmstart: WarmstartSpec) -> GrowthSpec | None:
    if new.base is None:
        return None
    options = warmstart.model_dump(exclude={"control", "seeds"})
    return GrowthSpec.model_validate(options | {"base": new.base.checkpoint})
