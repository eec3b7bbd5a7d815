"""Leasing: who trains what. No background loop: every lease request also repairs what it finds.

Locks are taken in one order, the study's row before a run's, or skipped when held, so that two
requests cannot wait for each other.
"""

from datetime import timedelta
from secrets import token_urlsafe

from sqlalchemy import ColumnElement, Select, func, select, update
from sqlalchemy.orm import Session, sessionmaker

from service.events import record
from service.lifecycle import FINAL_RUN_STATES, LIVE_RUN_STATES
from service.protocol import Lease, LeaseRequest, Resources
from service.runs.store import end_attempt, kept
from service.sampler import Sampler, Suggestion
from service.settings import Settings
from service.studies.advance import advance, lock, new_run
from service.studies.schemas import StudySpec
from service.tables import Run, Study
from warmcore.spec import CheckpointRef, RunSpec, derived_seed


def lease(
    sessions: sessionmaker[Session], sampler: Sampler, settings: Settings, request: LeaseRequest
) -> tuple[Lease, ...]:
    """Lease up to `max_runs` runs that fit together: those that wait, then new trials.

    Expired leases are taken back first, and finished trials that Optuna has not heard of are told.
    """
    with sessions.begin() as session:
        expire(session)
    tell_finished(sessions, sampler)
    free = request.resources
    with sessions.begin() as session:
        granted = _lease_queued(session, settings, request, free)
        for one in granted:
            free = _less(free, one.resources)
    while len(granted) < request.max_runs and _trials_wanted(request):
        with sessions.begin() as session:
            one = _lease_new_trial(session, sampler, settings, request, free)
        if one is None:
            break
        granted.append(one)
        free = _less(free, one.resources)
    return tuple(granted)


def expire(session: Session) -> None:
    """Take back the runs whose lease has run out, one study at a time."""
    query = select(Run.id, Run.study_id).where(
        Run.state == "leased", Run.lease_expires_at < func.now()
    )
    for run_id, study_id in session.execute(query.order_by(Run.study_id)).all():
        study = lock(session, study_id)
        run = session.scalars(
            select(Run)
            .where(Run.id == run_id, Run.state == "leased", Run.lease_expires_at < func.now())
            .with_for_update()
            .execution_options(populate_existing=True)
        ).one_or_none()
        if run is None:
            continue  # renewed, or taken back by another request
        error = f"lease of worker {run.worker!r} expired: no report within its time"
        end_attempt(session, run, "failed", error=error, retryable=True)
        session.flush()
        advance(session, study)


def tell_finished(sessions: sessionmaker[Session], sampler: Sampler) -> None:
    """Tell Optuna of every finished trial that it has not heard of. Telling twice is harmless."""
    with sessions() as session:
        query = (
            select(Run, Study.name)
            .join(Study, Study.id == Run.study_id)
            .where(Run.kind == "trial", ~Run.told, Run.state.in_(FINAL_RUN_STATES))
        )
        untold = session.execute(query.order_by(Run.finished_at).limit(100)).all()
    for run, study_name in untold:
        assert run.trial_number is not None
        end = "diverged" if run.diverged else run.state
        sampler.tell(study_name, run.trial_number, end, run.val_loss_nats)
        with sessions.begin() as session:
            session.execute(update(Run).where(Run.id == run.id).values(told=True))


def _lease_queued(
    session: Session, settings: Settings, request: LeaseRequest, free: Resources
) -> list[Lease]:
    query = (
        select(Run, Study.name)
        .join(Study, Study.id == Run.study_id)
        .where(
            Run.state == "queued",
            Run.available_at <= func.now(),
            Study.state.in_(("active", "completed")),  # completed: targets started by hand
            Run.cpus <= free.cpus,
            Run.gpus <= free.gpus,
            *_filters(request),
        )
        .order_by(Run.created_at, Run.id)
        .limit(request.max_runs)
        .with_for_update(of=Run, skip_locked=True)
    )
    granted: list[Lease] = []
    for run, study_name in session.execute(query):
        if _fits(Resources(cpus=run.cpus, gpus=run.gpus), free):
            granted.append(_grant(session, settings, request, run, study_name))
            free = _less(free, granted[-1].resources)
    return granted


def _filters(request: LeaseRequest) -> list[ColumnElement[bool]]:
    kinds = [] if request.kinds is None else [Run.kind.in_(request.kinds)]
    return [*_of_study(request), *kinds]


def _of_study(request: LeaseRequest) -> list[ColumnElement[bool]]:
    if request.study is None:
        return []
    return [(Study.name == request.study) | (Study.id == request.study)]


def _trials_wanted(request: LeaseRequest) -> bool:
    return request.kinds is None or "trial" in request.kinds


def _lease_new_trial(
    session: Session, sampler: Sampler, settings: Settings, request: LeaseRequest, free: Resources
) -> Lease | None:
    """Ask for a trial of the oldest study with room for one, and lease it."""
    for study_id in list(session.scalars(_with_room(request))):
        study = _claim(session, request, study_id)
        if study is None:
            continue
        spec = StudySpec.model_validate(study.spec)
        if not _fits(spec.resources.trial, free):
            continue
        suggestion = _orphan(session, sampler, study, spec) or sampler.ask(study.name, spec)
        run = _trial_run(study, spec, suggestion)
        session.add(run)
        session.flush()
        record(session, "run.queued", study_id=study.id, run_id=run.id, trial=suggestion.number)
        return _grant(session, settings, request, run, study.name)
    return None


def _with_room(request: LeaseRequest) -> Select[str]:
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
            *_of_study(request),
        )
        .order_by(Study.created_at)
    )


def _claim(session: Session, request: LeaseRequest, study_id: str) -> Study | None:
    """The study, locked, if nobody else holds it and it still has room.

    Room is counted again in a statement of its own: the one that took the lock may have counted
    before the last holder committed.
    """
    query = select(Study).where(Study.id == study_id).with_for_update(skip_locked=True)
    study = session.scalars(query.execution_options(populate_existing=True)).one_or_none()
    if study is None:
        return None
    still = session.scalar(_with_room(request).where(Study.id == study_id))
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


def _grant(
    session: Session, settings: Settings, request: LeaseRequest, run: Run, study_name: str
) -> Lease:
    """Lease a queued run, which this transaction has locked or made."""
    run.state, run.attempt = "leased", (run.attempt or 0) + 1
    run.worker, run.lease_token = request.worker, token_urlsafe(24)
    run.lease_expires_at = func.now() + timedelta(seconds=settings.lease_seconds)
    run.started_at = func.coalesce(Run.started_at, func.now())
    session.flush()
    record(
        session,
        "run.leased",
        study_id=run.study_id,
        run_id=run.id,
        attempt=run.attempt,
        worker=run.worker,
    )
    resume = [CheckpointRef(uri=row.uri, hash=row.hash) for row in kept(session, run.id)]
    return Lease.model_validate(
        {
            "run_id": run.id,
            "study_id": run.study_id,
            "study_name": study_name,
            "kind": run.kind,
            "trial_number": run.trial_number,
            "arm": run.arm,
            "attempt": run.attempt,
            "lease_token": run.lease_token,
            "lease_seconds": settings.lease_seconds,
            "spec": RunSpec.model_validate(run.spec),
            "params": run.params,
            "resources": Resources(cpus=run.cpus, gpus=run.gpus),
            "artifact_uri": artifact_uri(settings, run),
            "resume_from": tuple(resume),
            "reported_step": run.step or 0,
        }
    )


def artifact_uri(settings: Settings, run: Run) -> str:
    """Where an attempt's checkpoints go: the attempt's number fences off the ones before."""
    return f"{settings.artifact_root}/{run.study_id}/{run.id}/attempt-{run.attempt:03d}"


def _fits(needs: Resources, free: Resources) -> bool:
    return needs.cpus <= free.cpus and needs.gpus <= free.gpus


def _less(free: Resources, used: Resources) -> Resources:
    return Resources(cpus=free.cpus - used.cpus, gpus=max(0.0, free.gpus - used.gpus))
