"""Leasing: who trains what. No background loop: every lease request also repairs what it finds.

Locks are taken in one order, the study's row before a run's, or skipped when held, so that two
requests cannot wait for each other.
"""

import logging
from collections.abc import Iterable
from datetime import timedelta
from secrets import token_urlsafe

from sqlalchemy import ColumnElement, func, select
from sqlalchemy.orm import Session, sessionmaker

from service.events import record
from service.leases import trials
from service.leases.repair import Presence, expire, tell_finished
from service.protocol import FinishRequest, Lease, LeaseRequest, Resources
from service.runs.store import finish, kept
from service.sampler import TRANSIENT, Sampler
from service.settings import Settings
from service.studies.store import find
from service.studies.study_spec import StudyResources, StudySpec
from service.tables import Run, Study
from warmcore.spec import CheckpointRef, RunSpec

_log = logging.getLogger(__name__)
# A study that has ended may still have targets that were started by hand.
_LEASED_FROM = ("active", "completed", "failed")


def lease(
    sessions: sessionmaker[Session],
    sampler: Sampler,
    settings: Settings,
    presence: Presence,
    request: LeaseRequest,
) -> tuple[Lease, ...]:
    """Lease up to `max_runs` runs that fit together: those that wait, then new trials.

    Expired leases are taken back first, and finished trials that Optuna has not heard of are told.
    What has been granted is always returned: nobody else could train it.

    Raises:
        Problem: 404 for a study that does not exist.
    """
    if request.study is not None:
        with sessions() as session:
            find(session, request.study)
    expire(sessions, presence)
    tell_finished(sessions, sampler)
    free = request.resources
    with sessions.begin() as session:
        granted = _lease_queued(session, settings, request, free)
    for one in granted:
        free = free.less(one.resources)
    while len(granted) < request.max_runs and _trials_wanted(request):
        try:
            one = _lease_new_trial(sessions, sampler, settings, request, free)
        except TRANSIENT:
            if not granted:
                raise
            _log.warning("no further trial for now", exc_info=True)
            break
        if one is None:
            break
        granted.append(one)
        free = free.less(one.resources)
    return tuple(granted)


def give_back(sessions: sessionmaker[Session], leases: Iterable[Lease]) -> None:
    """Queue again what was granted to a client that is gone: no harm done, and no failure."""
    for one in leases:
        with sessions.begin() as session:
            finish(session, one.run_id, one.lease_token, FinishRequest(outcome="released"))


def _lease_queued(
    session: Session, settings: Settings, request: LeaseRequest, free: Resources
) -> list[Lease]:
    query = (
        select(Run, Study.name, Study.spec["resources"])
        .join(Study, Study.id == Run.study_id)
        .where(
            Run.state == "queued",
            Run.available_at <= func.now(),
            Study.state.in_(_LEASED_FROM),
            Run.cpus <= free.cpus,
            Run.gpus <= free.gpus,
            *_filters(request),
        )
        .order_by(Run.created_at, Run.id)
        .limit(request.max_runs)
        .with_for_update(of=Run, skip_locked=True)
    )
    granted: list[Lease] = []
    for run, study_name, resources in session.execute(query):
        needs = StudyResources.model_validate(resources).of(run.kind)
        if needs.fits(free):
            granted.append(_grant(session, settings, request, run, study_name, needs=needs))
            free = free.less(granted[-1].resources)
    return granted


def _filters(request: LeaseRequest) -> list[ColumnElement[bool]]:
    kinds = [] if request.kinds is None else [Run.kind.in_(request.kinds)]
    return [*trials.of_study(request), *kinds]


def _trials_wanted(request: LeaseRequest) -> bool:
    return request.kinds is None or "trial" in request.kinds


def _lease_new_trial(
    sessions: sessionmaker[Session],
    sampler: Sampler,
    settings: Settings,
    request: LeaseRequest,
    free: Resources,
) -> Lease | None:
    """Start a trial of the oldest study with room for one, and lease it."""
    with sessions() as session:
        candidates = list(session.scalars(trials.with_room(request)))
    for study_id in candidates:
        with sessions.begin() as session:
            study = trials.claim(session, request, study_id)
            run = None if study is None else trials.start(session, sampler, study, free)
            if study is not None and run is not None:
                needs = StudySpec.model_validate(study.spec).resources.trial
                return _grant(session, settings, request, run, study.name, needs=needs)
    return None


def _grant(
    session: Session,
    settings: Settings,
    request: LeaseRequest,
    run: Run,
    study_name: str,
    *,
    needs: Resources,
) -> Lease:
    """Lease a queued run, which this transaction has locked or made."""
    run.state, run.attempt = "leased", (run.attempt or 0) + 1
    run.worker, run.lease_token = request.worker, token_urlsafe(24)
    # Not now(), which is when this transaction began: an ask of Optuna's may have taken seconds.
    run.lease_expires_at = func.clock_timestamp() + timedelta(seconds=settings.lease_seconds)
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
            "resources": needs,
            "artifact_uri": artifact_uri(settings, run),
            "resume_from": tuple(resume),
            "reported_step": run.step or 0,
        }
    )


def artifact_uri(settings: Settings, run: Run) -> str:
    """Where an attempt's checkpoints go: the attempt's number fences off the ones before."""
    return f"{settings.artifact_root}/{run.study_id}/{run.id}/attempt-{run.attempt:03d}"
