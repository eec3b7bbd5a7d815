"""Granting: a run becomes a worker's for a while."""

from collections.abc import Iterable
from datetime import datetime, timedelta
from secrets import token_urlsafe

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from service.access.caller import Caller
from service.database.tables import Run, Study
from service.events.audit_log import NewEvent, new_event
from service.leases.attempts import finish
from service.protocol import FinishRequest, Lease, LeaseRequest, Resources
from service.runs.store import kept
from service.settings import Settings
from warmcore.specs import CheckpointRef, RunSpec


def clock(session: Session) -> datetime:
    """The database's time. Not now(), which is when this transaction began: it may have waited."""
    return session.scalars(select(func.clock_timestamp())).one()


def take(run: Run, request: LeaseRequest, settings: Settings, now: datetime) -> None:
    """Make a run, which this transaction has locked or is about to write, the request's."""
    run.state, run.attempt = "leased", (run.attempt or 0) + 1
    run.worker, run.lease_token, run.graced = request.worker, token_urlsafe(24), False
    run.lease_expires_at = now + timedelta(seconds=settings.lease_seconds)
    run.started_at = run.started_at or now


def leased_event(run: Run, caller: Caller) -> NewEvent:
    """The event of a run that was taken by this caller."""
    return new_event(
        "run.leased",
        study_id=run.study_id,
        run_id=run.id,
        attempt=run.attempt,
        actor=caller.key_id,
        worker=run.worker,
        kind=run.kind,
    )


def lease_of(
    session: Session, settings: Settings, run: Run, study: Study, *, needs: Resources
) -> Lease:
    """What its worker has to know of a run that was taken."""
    refs = kept(session, run.id) if run.attempt > 1 else ()
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


def give_back(session: Session, caller: Caller, leases: Iterable[Lease]) -> None:
    """Queue again what was granted to a client that is gone: no harm done, and no failure."""
    for one in leases:
        finish(session, caller, one.run_id, one.lease_token, FinishRequest(outcome="released"))


def artifact_uri(settings: Settings, run: Run) -> str:
    """Where an attempt's checkpoints go: the attempt's number fences off the ones before."""
    return f"{settings.artifact_root}/{run.study_id}/{run.id}/attempt-{run.attempt:03d}"
