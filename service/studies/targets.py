"""Warmstarts that a user starts by hand, beside the one that ends the study."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from service.database.tables import Checkpoint, Launch, Run, Study
from service.problems import bad_field, conflict, not_found
from service.runs.store import find_best_trial
from service.specs.budgets import check_no_other_budget
from service.specs.processes import check_batches
from service.specs.stored import parse_stored
from service.specs.study import StudySpec
from service.specs.target import (
    WarmstartSpec,
    check_size,
    check_trained_base,
    make_grown_model,
    override_train,
)
from service.studies.advance import enqueue_target, find_base
from service.studies.imported_base import check_imported_model, select_tuned_params
from service.studies.locks import lock_study
from service.studies.plan import Base, NewTarget, derive_target_seeds, make_target_run
from service.studies.schemas import ImportedBase, TargetRequest
from warmcore.specs import CheckpointRef, ModelSpec, RunSpec
from warmcore.specs.fields import FieldError, reason

if TYPE_CHECKING:
    from service.protocol import Arm


def start_targets(
    session: Session, study: Study, request: TargetRequest, key: str | None
) -> list[Run]:
    """Enqueue warm runs, and cold ones as control; the same idempotency key gives the same runs.

    Raises:
        Problem: 409 for a key that was used with another request, or as `_launch` says.
    """
    study = lock_study(session, study.id)
    asked = request.model_dump(mode="json")
    if key is not None and (again := _launched(session, study, key)) is not None:
        return _same(session, again, asked)
    started = _in_order(_launch(session, study, request))
    if key is not None:
        number = started[0].launch
        row = Launch(study_id=study.id, number=number, idempotency_key=key, request=asked)
        session.add(row)
    return started


def _launched(session: Session, study: Study, key: str) -> Launch | None:
    where = (Launch.study_id == study.id, Launch.idempotency_key == key)
    return session.scalars(select(Launch).where(*where)).one_or_none()


def _same(session: Session, launch: Launch, asked: dict[str, Any]) -> list[Run]:
    if launch.request != asked:
        key, number = launch.idempotency_key, launch.number
        detail = f"Idempotency-Key {key!r} was used for launch {number}, which asked for another"
        raise conflict("idempotency-key-reused", detail)
    where = (Run.study_id == launch.study_id, Run.launch == launch.number, Run.branch == 0)
    return _in_order(session.scalars(select(Run).where(*where)))


def _in_order(runs: Iterable[Run]) -> list[Run]:
    """As they are answered, the first time and every other: by seed, the warm one first."""
    return sorted(runs, key=lambda run: (run.seed, run.arm != "warm"))


def _launch(session: Session, study: Study, request: TargetRequest) -> list[Run]:
    """Enqueue the runs from the base that is asked for, for a study that is locked.

    Raises:
        Problem: 404 or 409 for a base that is not there; 422 for a target it cannot grow into.
    """
    if study.state in ("cancelled", "failed"):
        raise conflict(
            "wrong-state", f"study {study.name!r} is {study.state}; it starts no targets"
        )
    spec = parse_stored(study.spec)
    warmstart = request.warmstart or spec.warmstart
    base_run, base = _base(session, study, request)
    try:
        base_model = _base_model(spec, base_run, request, warmstart)
        model = make_grown_model(base_model, request.target, warmstart, "target")
        check_no_other_budget(request.target.budgets, request.target.train, "target")
    except FieldError as error:
        raise bad_field(error.path, error.value, str(error)) from None
    pairs = _pairs(spec, warmstart, base)
    try:
        run = make_target_run(spec, model, request.target, pairs[0], warmstart)
        check_size(run)
        check_batches("resources.target", spec.resources.target, {}, run.train)
    except ValueError as error:
        budgets = list(request.target.budgets)
        field, value = ("budgets", budgets) if budgets else ("train", request.target.train)
        raise bad_field(f"target.{field}", value, reason(error)) from None
    launch = 1 + (session.scalar(select(func.max(Run.launch)).where(Run.study_id == study.id)) or 0)
    return [
        enqueue_target(
            session,
            study,
            spec,
            new,
            model=model,
            target=request.target,
            warmstart=warmstart,
            launch=launch,
        )
        for new in pairs
    ]


def _pairs(spec: StudySpec, warmstart: WarmstartSpec, base: Base) -> list[NewTarget]:
    arms: tuple[Arm, ...] = ("warm", "cold") if warmstart.control else ("warm",)
    return [
        NewTarget(
            rung=0, arm=arm, seed=seed, params=base.params, base=base if arm == "warm" else None
        )
        for seed in derive_target_seeds(spec.hpo.seed, warmstart.seeds)
        for arm in arms
    ]


def _base_model(
    spec: StudySpec, run: Run | None, request: TargetRequest, warmstart: WarmstartSpec
) -> ModelSpec:
    """The model to grow; a FieldError where it, or what was trained with it, cannot go on."""
    train = override_train(spec.train, request.target, "target")
    if run is None:
        assert request.base is not None
        check_imported_model(spec, request.base.model, warmstart)
        return request.base.model
    trained = RunSpec.model_validate(run.spec)
    check_trained_base(warmstart, trained.train, train, "target")
    return trained.model


def _base(session: Session, study: Study, request: TargetRequest) -> tuple[Run | None, Base]:
    """What to grow, and the run that made it; None: it was imported."""
    given = [name for name in ("trial", "checkpoint", "base") if getattr(request, name) is not None]
    if len(given) > 1:
        value = getattr(request, given[1])
        raise bad_field(given[1], value, f"give one of {' and '.join(given)}")
    if request.base is not None:
        return None, _imported(session, study, request.base)
    if request.checkpoint is not None:
        return _from_checkpoint(session, study, request.checkpoint)
    run = _trial(session, study, request.trial)
    base = find_base(session, run)
    if base is None:
        raise conflict("no-checkpoint", f"trial {run.trial_number} has no final checkpoint to grow")
    return run, base


def _imported(session: Session, study: Study, base: ImportedBase) -> Base:
    """To be trained with the best trial's parameters; without one yet, as the spec says.

    One of ours, of any study, is held while this transaction lasts, and named by the run from then
    on: neither its own run nor a collection deletes it.
    """
    same = (Checkpoint.uri == base.uri) | (Checkpoint.hash == base.hash)
    held = session.scalars(select(Checkpoint).where(same).with_for_update(read=True)).all()
    if any(row.superseded for row in held if row.uri == base.uri):
        raise bad_field("base.uri", base.uri, "this checkpoint was deleted; choose another")
    best = find_best_trial(session, study.id)
    params = {} if best is None else select_tuned_params(best.params)
    ref = CheckpointRef(uri=base.uri, hash=base.hash)
    ours = next((row.id for row in held if row.uri == base.uri), None)
    return Base(checkpoint_id=ours, checkpoint=ref, params=params)


def _trial(session: Session, study: Study, number: int | None) -> Run:
    if number is None:
        best = find_best_trial(session, study.id)
        if best is None:
            raise conflict("no-trial", f"no trial of study {study.name!r} has succeeded yet")
        return best
    query = select(Run).where(Run.study_id == study.id, Run.trial_number == number)
    run = session.scalars(query).one_or_none()
    if run is None:
        raise not_found("trial", str(number))
    return run


def _from_checkpoint(session: Session, study: Study, checkpoint_id: int) -> tuple[Run, Base]:
    query = (
        select(Run, Checkpoint)
        .join(Checkpoint, Checkpoint.run_id == Run.id)
        .where(Checkpoint.id == checkpoint_id, Run.study_id == study.id, ~Checkpoint.superseded)
        .with_for_update(read=True, of=Checkpoint)
    )
    row = session.execute(query).one_or_none()
    if row is None:
        raise not_found("checkpoint", str(checkpoint_id))
    run, checkpoint = row
    ref = CheckpointRef(uri=checkpoint.uri, hash=checkpoint.hash)
    return run, Base(checkpoint_id=checkpoint.id, checkpoint=ref, params=run.params)
