"""The step of a study after one of its runs has ended: enqueue targets, or end the study.

It is taken in the transaction that ends the run, while that transaction holds the study's row.
"""

import logging

from sqlalchemy import ColumnElement, bindparam, func, select, update
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from service.database.tables import Checkpoint, Run, Study
from service.events.audit_log import record_event
from service.lifecycle import FINAL_RUN_STATES, FINAL_STUDY_STATES, LIVE_RUN_STATES
from service.observability import tracing
from service.runs.store import find_best_growable, find_best_trial, make_run
from service.specs.stored import UnreadableSpecError, parse_stored
from service.specs.study import StudySpec
from service.specs.target import TargetSpec, WarmstartSpec
from service.studies.plan import Base, End, NewTarget, TargetFact, make_target_run, plan_next_step
from warmcore.specs import CheckpointRef, ModelSpec

_log = logging.getLogger(__name__)
_HIGHEST = select(func.max(Run.trial_number)).where(Run.study_id == bindparam("study"))


def advance_study(session: Session, study: Study) -> None:
    """Take the study's next step, if all its trials have finished; `study` is locked.

    An unexpected error fails the study. It must not undo the end of the run, since its worker
    would train the same run again.

    Raises:
        UnreadableSpecError: 503; a replica that can read the spec must take this end.
    """
    if _has_trials_left(session, study):
        return
    try:
        # The savepoint lets an error undo this step and keep the end of the run.
        with tracing.span("advance", study=study.id), session.begin_nested():
            _take_next_step(session, study)
    except (OperationalError, UnreadableSpecError):
        raise  # the database is away, for example: nothing is written and the worker retries
    except Exception as error:  # noqa: BLE001 - the run's end must be kept
        _log.exception("cannot move on", extra={"study": study.id})
        end_study(session, study, "failed", f"cannot move on: {type(error).__name__}: {error}")


def _take_next_step(session: Session, study: Study) -> None:
    # Trials that are still queued or leased have numbers too: count those that have ended.
    budget = study.spec["hpo"]["trials"]
    if study.state in FINAL_STUDY_STATES or _count_finished_trials(session, study) < budget:
        return
    # The spec is parsed only here: a replica that cannot read it takes every other end of a run.
    spec = parse_stored(study.spec)
    step = plan_next_step(
        spec,
        _find_best_base(session, study.id),
        _load_targets(session, study.id),
        any_succeeded=find_best_trial(session, study.id) is not None,
    )
    match step:
        case End(state=state, reason=reason):
            end_study(session, study, state, reason)
        case tuple() as missing:
            for new in missing:
                _enqueue_planned(session, study, spec, new)
        case None:  # target runs are under way
            pass


def _has_trials_left(session: Session, study: Study) -> bool:
    """Return whether trials of the budget have not started yet.

    Each trial has a number of its own. Therefore a highest number of 41 means at most 42 trials:
    one read of an index, where a count reads every trial.
    """
    highest = session.scalar(_HIGHEST, {"study": study.id})
    return highest is None or highest + 1 < study.spec["hpo"]["trials"]


def _find_best_base(session: Session, study_id: str) -> Base | None:
    best = find_best_growable(session, study_id)
    return None if best is None else find_base(session, best)


def find_base(session: Session, run: Run) -> Base | None:
    """Return the run's final checkpoint as a base; None if the run published none."""
    query = (
        select(Checkpoint)
        .where(Checkpoint.run_id == run.id, Checkpoint.final, ~Checkpoint.superseded)
        .order_by(Checkpoint.attempt.desc())
        .limit(1)
    )
    row = session.scalars(query).one_or_none()
    if row is None:
        return None
    ref = CheckpointRef(uri=row.uri, hash=row.hash)
    return Base(checkpoint_id=row.id, checkpoint=ref, params=run.params)


def enqueue_target(
    session: Session,
    study: Study,
    spec: StudySpec,
    new: NewTarget,
    *,
    model: ModelSpec,
    target: TargetSpec,
    warmstart: WarmstartSpec,
    launch: int,
) -> Run:
    """Write a queued target run."""
    run_spec = make_target_run(spec, model, target, new, warmstart)
    run = make_run(study, spec, run_spec, new.params)
    # Launch 0 is the study's own; targets that a user starts by hand count from 1.
    run.kind, run.launch, run.rung, run.arm = "target", launch, new.rung, new.arm
    run.cpus, run.gpus = spec.resources.target.cpus, spec.resources.target.gpus
    run.base_checkpoint_id = new.base.checkpoint_id if new.base else None
    run.base_hash = new.base.checkpoint.hash if new.base else None
    session.add(run)
    session.flush()
    record_event(
        session, "run.queued", study_id=study.id, run_id=run.id, arm=new.arm, rung=new.rung
    )
    return run


def _enqueue_planned(session: Session, study: Study, spec: StudySpec, new: NewTarget) -> None:
    enqueue_target(
        session,
        study,
        spec,
        new,
        model=spec.rung_model(new.rung),
        target=spec.rungs[new.rung],
        warmstart=spec.warmstart,
        launch=0,
    )


def _count_finished_trials(session: Session, study: Study) -> int:
    query = select(func.count()).where(
        Run.study_id == study.id, Run.kind == "trial", Run.state.in_(FINAL_RUN_STATES)
    )
    return session.scalar(query) or 0


def _load_targets(session: Session, study_id: str) -> tuple[TargetFact, ...]:
    query = select(Run).where(Run.study_id == study_id, Run.kind == "target", Run.launch == 0)
    return tuple(
        TargetFact(
            rung=run.rung,
            arm="warm" if run.arm == "warm" else "cold",
            seed=run.seed,
            branch=run.branch,
            state=run.state,  # pyright: ignore[reportArgumentType] - checked by the database
            base=find_base(session, run) if run.state == "succeeded" else None,
        )
        for run in session.scalars(query)
    )


def end_study(session: Session, study: Study, state: str, reason: str | None) -> None:
    """End a study, whose row is locked. The live runs of a failed study are cancelled.

    Targets that a user started by hand (launch 1 and higher) go on.
    """
    if state == "failed":
        cancel_runs(session, study.id, Run.launch == 0)
    session.execute(
        update(Study)
        .where(Study.id == study.id)
        .values(state=state, reason=reason, finished_at=func.now())
    )
    record_event(session, f"study.{state}", study_id=study.id, reason=reason)


def cancel_runs(session: Session, study_id: str, *conditions: ColumnElement[bool]) -> int:
    """Cancel the live runs of a study and return their number.

    The answer to its next report tells each worker.
    """
    cancelled = session.execute(
        update(Run)
        .where(Run.study_id == study_id, Run.state.in_(LIVE_RUN_STATES), *conditions)
        .values(state="cancelled", finished_at=func.now(), lease_expires_at=None)
        .returning(Run.id, Run.attempt)
    ).all()
    # An event for each run: streams of a run end with it.
    for run_id, attempt in cancelled:
        record_event(session, "run.cancelled", study_id=study_id, run_id=run_id, attempt=attempt)
    return len(cancelled)
