"""Targets that a user starts by hand, in addition to those that end the study."""

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
    TargetSpec,
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
from warmcore.specs.fields import FieldError, format_reason

if TYPE_CHECKING:
    from service.protocol import Arm


def start_targets(
    session: Session, study: Study, request: TargetRequest, key: str | None
) -> list[Run]:
    """Enqueue warm runs, and cold runs as control; the same idempotency key gives the same runs.

    Raises:
        Problem: 409 for a key that was used with another request, or as `_enqueue_launch` says.
    """
    # With the study's row locked, of two requests with the same key the second finds the first's
    # runs.
    study = lock_study(session, study.id)
    body = request.model_dump(mode="json")
    if key is not None and (earlier := _find_launch(session, study, key)) is not None:
        return _load_runs_of(session, earlier, body)
    started = _sort_runs(_enqueue_launch(session, study, request))
    if key is not None:
        number = started[0].launch
        row = Launch(study_id=study.id, number=number, idempotency_key=key, request=body)
        session.add(row)
    return started


def _find_launch(session: Session, study: Study, key: str) -> Launch | None:
    where = (Launch.study_id == study.id, Launch.idempotency_key == key)
    return session.scalars(select(Launch).where(*where)).one_or_none()


def _load_runs_of(session: Session, launch: Launch, body: dict[str, Any]) -> list[Run]:
    """Return the runs that an earlier request with the same key and the same body started."""
    if launch.request != body:
        key, number = launch.idempotency_key, launch.number
        detail = f"Idempotency-Key {key!r} was used for launch {number} with another request"
        raise conflict("idempotency-key-reused", detail)
    # Branches of these runs were enqueued later and were in no answer.
    where = (Run.study_id == launch.study_id, Run.launch == launch.number, Run.branch == 0)
    return _sort_runs(session.scalars(select(Run).where(*where)))


def _sort_runs(runs: Iterable[Run]) -> list[Run]:
    """Return the runs in the order of every answer: by seed, the warm run first."""
    return sorted(runs, key=lambda run: (run.seed, run.arm != "warm"))


def _enqueue_launch(session: Session, study: Study, request: TargetRequest) -> list[Run]:
    """Enqueue the runs that grow from the requested base; the study is locked.

    Raises:
        Problem: 404 or 409 for a base that does not exist; 422 for a target it cannot grow into.
    """
    if study.state in ("cancelled", "failed"):
        raise conflict(
            "wrong-state", f"study {study.name!r} is {study.state}; it starts no targets"
        )
    spec = parse_stored(study.spec)
    warmstart = request.warmstart or spec.warmstart
    base_run, base = _find_requested_base(session, study, request)
    model = _make_target_model(spec, base_run, request, warmstart)
    new_targets = _plan_pairs(spec, warmstart, base)
    # The runs differ in seed and growth alone: a check of the first covers all.
    _check_run(spec, model, request.target, new_targets[0], warmstart)
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
        for new in new_targets
    ]


def _make_target_model(
    spec: StudySpec, base_run: Run | None, request: TargetRequest, warmstart: WarmstartSpec
) -> ModelSpec:
    try:
        base_model = _check_base_model(spec, base_run, request, warmstart)
        model = make_grown_model(base_model, request.target, warmstart, "target")
        check_no_other_budget(request.target.budgets, request.target.train, "target")
    except FieldError as error:
        raise bad_field(error.path, error.value, str(error)) from None
    return model


def _check_run(
    spec: StudySpec,
    model: ModelSpec,
    target: TargetSpec,
    new: NewTarget,
    warmstart: WarmstartSpec,
) -> None:
    try:
        run = make_target_run(spec, model, target, new, warmstart)
        check_size(run)
        check_batches("resources.target", spec.resources.target, {}, run.train)
    except ValueError as error:
        # The request has no field of its own for a size: name the field that decides it.
        budgets = list(target.budgets)
        field, value = ("budgets", budgets) if budgets else ("train", target.train)
        raise bad_field(f"target.{field}", value, format_reason(error)) from None


def _plan_pairs(spec: StudySpec, warmstart: WarmstartSpec, base: Base) -> list[NewTarget]:
    arms: tuple[Arm, ...] = ("warm", "cold") if warmstart.control else ("warm",)
    return [
        NewTarget(
            rung=0, arm=arm, seed=seed, params=base.params, base=base if arm == "warm" else None
        )
        for seed in derive_target_seeds(spec.hpo.seed, warmstart.seeds)
        for arm in arms
    ]


def _check_base_model(
    spec: StudySpec, run: Run | None, request: TargetRequest, warmstart: WarmstartSpec
) -> ModelSpec:
    """Return the model to grow.

    Raises:
        FieldError: the warmstart needs optimizer state or weights that the base does not have.
    """
    train = override_train(spec.train, request.target, "target")
    if run is None:
        assert request.base is not None
        check_imported_model(spec, request.base.model, warmstart)
        return request.base.model
    # The base was trained with the study's spec and its own parameters, hence its run's spec.
    trained = RunSpec.model_validate(run.spec)
    check_trained_base(warmstart, trained.train, train, "target")
    return trained.model


def _find_requested_base(
    session: Session, study: Study, request: TargetRequest
) -> tuple[Run | None, Base]:
    """Return the base that the request names, and the run that made it; None: it was imported."""
    given = [name for name in ("trial", "checkpoint", "base") if getattr(request, name) is not None]
    if len(given) > 1:
        value = getattr(request, given[1])
        raise bad_field(given[1], value, f"give one of {' and '.join(given)}")
    if request.base is not None:
        return None, _hold_imported_base(session, study, request.base)
    if request.checkpoint is not None:
        return _find_checkpoint_base(session, study, request.checkpoint)
    run = _find_trial(session, study, request.trial)
    base = find_base(session, run)
    if base is None:
        raise conflict("no-checkpoint", f"trial {run.trial_number} has no final checkpoint to grow")
    return run, base


def _hold_imported_base(session: Session, study: Study, base: ImportedBase) -> Base:
    """Return an imported model as a base, with the best trial's parameters if there is one.

    The URI may name a checkpoint of any study here. Its row is then locked until the commit, and
    the new run refers to it: neither its own run nor `checkpoints collect` deletes it.
    """
    is_same = (Checkpoint.uri == base.uri) | (Checkpoint.hash == base.hash)
    held = session.scalars(select(Checkpoint).where(is_same).with_for_update(read=True)).all()
    if any(row.superseded for row in held if row.uri == base.uri):
        raise bad_field("base.uri", base.uri, "this checkpoint was deleted; choose another")
    best = find_best_trial(session, study.id)
    params = {} if best is None else select_tuned_params(best.params)
    ref = CheckpointRef(uri=base.uri, hash=base.hash)
    own_id = next((row.id for row in held if row.uri == base.uri), None)
    return Base(checkpoint_id=own_id, checkpoint=ref, params=params)


def _find_trial(session: Session, study: Study, number: int | None) -> Run:
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


def _find_checkpoint_base(session: Session, study: Study, checkpoint_id: int) -> tuple[Run, Base]:
    query = (
        select(Run, Checkpoint)
        .join(Checkpoint, Checkpoint.run_id == Run.id)
        .where(Checkpoint.id == checkpoint_id, Run.study_id == study.id, ~Checkpoint.superseded)
        # Locked: its run cannot supersede it before the new runs refer to it.
        .with_for_update(read=True, of=Checkpoint)
    )
    row = session.execute(query).one_or_none()
    if row is None:
        raise not_found("checkpoint", str(checkpoint_id))
    run, checkpoint = row
    ref = CheckpointRef(uri=checkpoint.uri, hash=checkpoint.hash)
    return run, Base(checkpoint_id=checkpoint.id, checkpoint=ref, params=run.params)
