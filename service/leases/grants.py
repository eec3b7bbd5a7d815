"""Granting runs to workers: queued runs, and for every run its row, its event and its message."""

from datetime import datetime, timedelta
from secrets import token_urlsafe
from typing import get_args

from sqlalchemy import Select, func, select
from sqlalchemy.orm import Session

from service.access.caller import Caller
from service.database.tables import Run, Study
from service.events.audit_log import NewEvent, new_event, record_events
from service.leases.requests import PendingRequest
from service.leases.services import LeaseServices
from service.protocol import Lease, LeaseRequest, Resources, RunKind
from service.runs.store import load_kept_checkpoints
from service.settings import Settings
from service.specs.processes import StudyResources
from service.specs.stored import log_skipped_study
from warmcore.specs import CheckpointRef, RunSpec

# A study that has ended may have targets that a user started by hand.
_LEASED_FROM = ("active", "completed", "failed")
QUEUED = (
    select(Run, Study)
    .join(Study, Study.id == Run.study_id)
    .where(Run.state == "queued", Run.available_at <= func.now(), Study.state.in_(_LEASED_FROM))
)


def grant_queued_runs(services: LeaseServices, requests: list[PendingRequest]) -> None:
    """Grant queued runs to each request in order, in a single transaction."""
    granted: list[tuple[PendingRequest, Lease]] = []
    nothing_left: set[tuple[object, ...]] = set()
    with services.sessions.begin() as session:
        for pending in requests:
            # Skip the query for a request that equals an earlier request without a grant.
            alike = (pending.scope, pending.request.kinds, pending.request.resources)
            if pending.num_wanted and alike not in nothing_left:
                leases = _grant_queued_to(session, services.settings, pending)
                granted += [(pending, lease) for lease in leases]
                if not leases:
                    nothing_left.add(alike)
    for pending, lease in granted:  # after the commit: a rollback would have granted nothing
        pending.granted.append(lease)


def _grant_queued_to(session: Session, settings: Settings, pending: PendingRequest) -> list[Lease]:
    """Grant a request queued runs until no further run is readable and fits."""
    granted: list[Lease] = []
    unreadable: list[str] = []
    while True:
        num_unreadable = len(unreadable)
        granted += _grant_readable(session, settings, pending, granted, unreadable)
        # Unreadable rows used up places of the query's limit: query again without them.
        if len(unreadable) == num_unreadable:
            return granted


def _grant_readable(
    session: Session,
    settings: Settings,
    pending: PendingRequest,
    before: list[Lease],
    unreadable: list[str],
) -> list[Lease]:
    """Grant the next queued runs that fit beside `before`; add the ids of unreadable runs.

    While an installation is upgraded, a newer replica may have written a run that this version
    cannot read. It stays queued for that replica and must not hold up other runs.
    """
    free, now = pending.free_resources, read_clock(session)
    for lease in before:
        free = free.subtract(lease.resources)
    query = _select_queued(pending, free, unreadable).limit(pending.num_wanted - len(before))
    granted: list[Lease] = []
    for run, study in session.execute(query):
        try:
            needs = StudyResources.model_validate(study.spec["resources"]).needs_of(run.kind)
            RunSpec.model_validate(run.spec)
        except (KeyError, ValueError) as error:
            log_skipped_study(study.id, f"its run {run.id}: {type(error).__name__}")
            unreadable.append(run.id)
            continue
        if needs.fits(free):
            take_run(run, pending.request, settings, now)
            session.flush()
            record_events(session, [leased_event(run, pending.caller)])
            granted.append(make_lease(session, settings, run, study, needs=needs))
            free = free.subtract(needs)
    return granted


def _select_queued(
    pending: PendingRequest, free: Resources, unreadable: list[str]
) -> Select[Run, Study]:
    """Return the query for queued runs of the request's kinds that fit, the oldest first.

    It locks the rows that it returns and skips the rows that another round has locked.
    """
    assert pending.study_filter is not None
    kinds = get_args(RunKind) if pending.request.kinds is None else pending.request.kinds
    return (
        QUEUED.where(Run.cpus <= free.cpus, Run.gpus <= free.gpus, pending.study_filter)
        .where(Run.kind.in_(kinds), Run.id.not_in(unreadable))
        .order_by(Run.created_at, Run.id)
        .with_for_update(of=Run, skip_locked=True)
    )


def read_clock(session: Session) -> datetime:
    """Return the database's time now.

    SQL's `now()` is the time at which the transaction began; it may have waited for a lock since.
    """
    return session.scalars(select(func.clock_timestamp())).one()


def take_run(run: Run, request: LeaseRequest, settings: Settings, now: datetime) -> None:
    """Lease a run to the request's worker, as the run's next attempt.

    The transaction has locked the run's row, or is about to insert it.
    """
    run.state, run.attempt = "leased", (run.attempt or 0) + 1
    # A new token makes the writes of earlier attempts stale.
    run.worker, run.lease_token, run.graced = request.worker, token_urlsafe(24), False
    run.lease_expires_at = now + timedelta(seconds=settings.lease_seconds)
    run.started_at = run.started_at or now


def leased_event(run: Run, caller: Caller) -> NewEvent:
    """Build the event of a run that this caller's worker has leased."""
    return new_event(
        "run.leased",
        study_id=run.study_id,
        run_id=run.id,
        attempt=run.attempt,
        actor=caller.key_id,
        worker=run.worker,
        kind=run.kind,
    )


def make_lease(
    session: Session, settings: Settings, run: Run, study: Study, *, needs: Resources
) -> Lease:
    """Build the message that tells a worker how to train the run it has leased."""
    refs = load_kept_checkpoints(session, run.id) if run.attempt > 1 else ()
    return Lease.model_validate(
        {
            "run_id": run.id,
            "study_id": run.study_id,
            "study_name": study.name,
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
            "resume_from": tuple(CheckpointRef(uri=row.uri, hash=row.hash) for row in refs),
            "reported_step": run.step or 0,
        }
    )


def artifact_uri(settings: Settings, run: Run) -> str:
    """Return the folder of this attempt's checkpoints.

    Each attempt has a folder of its own: an earlier attempt that still writes overwrites nothing.
    """
    return f"{settings.artifact_root}/{run.study_id}/{run.id}/attempt-{run.attempt:03d}"
