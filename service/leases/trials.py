"""New trials: which study may start one, and what Optuna suggests for it."""

import logging

from sqlalchemy import ColumnElement, Select, func, select
from sqlalchemy.orm import Session

from service.events import record
from service.lifecycle import LIVE_RUN_STATES
from service.protocol import LeaseRequest, Resources
from service.sampler import TRANSIENT, Sampler, Suggestion
from service.studies.advance import end, new_run
from service.studies.study_spec import StudySpec
from service.tables import Run, Study
from warmcore.spec import derived_seed

_log = logging.getLogger(__name__)


def of_study(request: LeaseRequest) -> list[ColumnElement[bool]]:
    """The filter of a request that names a study."""
    if request.study is None:
        return []
    return [(Study.name == request.study) | (Study.id == request.study)]


def start(session: Session, sampler: Sampler, study: Study, free: Resources) -> Run | None:
    """Ask for a trial of a study, which is locked, and write its run, queued; None if it fits not.

    A fault in one study (never its database being away) must not stop the others: it fails that
    study, and None is returned.
    """
    try:
        with session.begin_nested():
            return _start(session, sampler, study, free)
    except TRANSIENT:
        raise
    except Exception as error:  # noqa: BLE001 - one study's fault is that study's alone
        _log.exception("cannot start a trial", extra={"study": study.id})
        end(session, study, "failed", f"cannot start a trial: {type(error).__name__}: {error}")
        return None


def _start(session: Session, sampler: Sampler, study: Study, free: Resources) -> Run | None:
    spec = StudySpec.model_validate(study.spec)
    if not spec.resources.trial.fits(free):
        return None
    suggestion = _orphan(session, sampler, study, spec) or sampler.ask(study.name, spec)
    run = _trial_run(study, spec, suggestion)
    session.add(run)
    session.flush()
    record(session, "run.queued", study_id=study.id, run_id=run.id, trial=run.trial_number)
    return run


def with_room(request: LeaseRequest) -> Select[str]:
    """Active studies with fewer live trials than `parallel` and fewer trials than their budget."""
    trials = select(func.count()).where(Run.study_id == Study.id, Run.kind == "trial")
    live = trials.where(Run.state.in_(LIVE_RUN_STATES))
    hpo = Study.spec["hpo"]
    return (
        select(Study.id)
        .where(
            Study.state == "active",
            trials.scalar_subquery() < hpo["trials"].as_integer(),
            live.scalar_subquery() < hpo["parallel"].as_integer(),
            *of_study(request),
        )
        .order_by(Study.created_at)
    )


def claim(session: Session, request: LeaseRequest, study_id: str) -> Study | None:
    """The study, locked, if nobody else holds it and it still has room.

    Room is counted again in a statement of its own: the one that took the lock may have counted
    before the last holder committed.
    """
    query = (
        select(Study).where(Study.id == study_id).with_for_update(key_share=True, skip_locked=True)
    )
    study = session.scalars(query.execution_options(populate_existing=True)).one_or_none()
    if study is None:
        return None
    still = session.scalar(with_room(request).where(Study.id == study_id))
    return study if still else None


def _orphan(session: Session, sampler: Sampler, study: Study, spec: StudySpec) -> Suggestion | None:
    """A trial that Optuna started but whose run was never written: a crash fell in between."""
    query = select(Run.trial_number).where(Run.study_id == study.id, Run.kind == "trial")
    known = set(session.scalars(query))
    lost = [number for number in sampler.running(study.name) if number not in known]
    return sampler.adopt(study.name, spec, lost[0]) if lost else None


def _trial_run(study: Study, spec: StudySpec, suggestion: Suggestion) -> Run:
    seed = derived_seed(spec.hpo.seed, suggestion.number)
    run = new_run(
        study, spec, spec.trial_run(seed).with_params(suggestion.params), suggestion.params
    )
    run.kind, run.trial_number = "trial", suggestion.number
    run.cpus, run.gpus = spec.resources.trial.cpus, spec.resources.trial.gpus
    return run
