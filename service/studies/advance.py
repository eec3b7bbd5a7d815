"""Moves a study on when a run has ended: in the transaction that ended it, under its row lock."""

import logging

from sqlalchemy import ColumnElement, bindparam, func, select, update
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from service.database.tables import Checkpoint, Run, Study
from service.events.audit_log import record_event
from service.lifecycle import FINAL_RUN_STATES, FINAL_STUDY_STATES, LIVE_RUN_STATES
from service.observability import tracing
from service.runs.store import best_growable, best_trial, new_run
from service.specs.stored import UnreadableSpecError, parse_stored
from service.specs.study import StudySpec, TargetSpec, WarmstartSpec
from service.studies.plan import Base, End, NewTarget, TargetFact, next_step, target_run
from warmcore.specs import CheckpointRef, ModelSpec

_log = logging.getLogger(__name__)
_HIGHEST = select(func.max(Run.trial_number)).where(Run.study_id == bindparam("study"))


def advance(session: Session, study: Study) -> None:
    """Enqueue what follows, or end the study; nothing while trials remain. `study` is locked.

    A fault in this must not undo the end of the run that led here: it fails the study.

    Raises:
        UnreadableSpecError: 503, the end is for a replica of the version that knows what follows.
    """
    if _trials_remain(session, study):
        return
    try:
        with tracing.span("advance", study=study.id), session.begin_nested():
            _advance(session, study)
    except (OperationalError, UnreadableSpecError):
        raise  # the database went away, or so: nothing is done, and it is tried again
    except Exception as error:  # noqa: BLE001 - whatever it is, the run's end must stand
        _log.exception("cannot move on", extra={"study": study.id})
        end(session, study, "failed", f"cannot move on: {type(error).__name__}: {error}")


def _advance(session: Session, study: Study) -> None:
    budget = study.spec["hpo"]["trials"]
    if study.state in FINAL_STUDY_STATES or _finished_trials(session, study) < budget:
        return
    spec = parse_stored(study.spec)
    step = next_step(
        spec,
        _best_base(session, study.id),
        _targets(session, study.id),
        any_succeeded=best_trial(session, study.id) is not None,
    )
    match step:
        case End(state=state, reason=reason):
            end(session, study, state, reason)
        case tuple() as missing:
            for new in missing:
                _enqueue(session, study, spec, new)
        case None:
            pass


def _trials_remain(session: Session, study: Study) -> bool:
    """Whether trials of the budget have yet to start: one look at an index, not a count.

    Numbers are of one trial each, so there are no more trials than the highest plus one.
    """
    highest = session.scalar(_HIGHEST, {"study": study.id})
    return highest is None or highest + 1 < study.spec["hpo"]["trials"]


def _best_base(session: Session, study_id: str) -> Base | None:
    best = best_growable(session, study_id)
    return None if best is None else base_of(session, best)


def base_of(session: Session, run: Run) -> Base | None:
    """The run's final checkpoint as a base; None when it published none."""
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
    """Write one target run, queued."""
    run_spec = target_run(spec, model, target, new, warmstart)
    run = new_run(study, spec, run_spec, new.params)
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


def _enqueue(session: Session, study: Study, spec: StudySpec, new: NewTarget) -> None:
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


def _finished_trials(session: Session, study: Study) -> int:
    query = select(func.count()).where(
        Run.study_id == study.id, Run.kind == "trial", Run.state.in_(FINAL_RUN_STATES)
    )
    return session.scalar(query) or 0


def _targets(session: Session, study_id: str) -> tuple[TargetFact, ...]:
    query = select(Run).where(Run.study_id == study_id, Run.kind == "target", Run.launch == 0)
    return tuple(
        TargetFact(
            rung=run.rung,
            arm="warm" if run.arm == "warm" else "cold",
            seed=run.seed,
            branch=run.branch,
            state=run.state,  # pyright: ignore[reportArgumentType] - checked by the database
            base=base_of(session, run) if run.state == "succeeded" else None,
        )
        for run in session.scalars(query)
    )


def end(session: Session, study: Study, state: str, reason: str | None) -> None:
    """End a study, which is locked; of a failed one only what was started by hand goes on."""
    if state == "failed":
        cancel_runs(session, study.id, Run.launch == 0)
    session.execute(
        update(Study)
        .where(Study.id == study.id)
        .values(state=state, reason=reason, finished_at=func.now())
    )
    record_event(session, f"study.{state}", study_id=study.id, reason=reason)


def cancel_runs(session: Session, study_id: str, *which: ColumnElement[bool]) -> int:
    """Cancel the live runs of a study; a worker hears it at its next report. Return how many."""
    cancelled = session.execute(
        update(Run)
        .where(Run.study_id == study_id, Run.state.in_(LIVE_RUN_STATES), *which)
        .values(state="cancelled", finished_at=func.now(), lease_expires_at=None)
        .returning(Run.id, Run.attempt)
    ).all()
    for run_id, attempt in cancelled:
        record_event(session, "run.cancelled", study_id=study_id, run_id=run_id, attempt=attempt)
    return len(cancelled)
