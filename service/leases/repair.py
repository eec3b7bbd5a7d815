"""What every lease request mends first: leases that ran out, ends that Optuna has not heard of."""

import threading
import time
from datetime import timedelta

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session, sessionmaker

from service.lifecycle import FINAL_RUN_STATES
from service.runs.store import end_attempt
from service.sampler import Sampler
from service.studies.advance import advance, lock
from service.tables import Run, Study

_EXPIRED = (Run.state == "leased", Run.lease_expires_at < func.now())


class Presence:
    """Whether this process and its database have been there for the workers.

    While they were away no worker could renew its lease. After an absence longer than a lease,
    live leases are given their time again instead of being taken back: the absence was ours.
    """

    def __init__(self, lease_seconds: float) -> None:
        self.lease_seconds = lease_seconds
        self._lock = threading.Lock()
        self._last: float | None = None

    def seen(self) -> bool:
        """Note that a request was served just now; False when the one before is too long ago."""
        now = time.clock_gettime(time.CLOCK_BOOTTIME)  # goes on while a laptop sleeps
        with self._lock:
            before, self._last = self._last, now
        return before is not None and now - before <= self.lease_seconds


def expire(sessions: sessionmaker[Session], presence: Presence) -> None:
    """Take back the runs whose lease has run out, one study and one transaction at a time."""
    with sessions.begin() as session:
        studies = list(session.scalars(select(Run.study_id).where(*_EXPIRED).distinct()))
        if not presence.seen():
            more = func.clock_timestamp() + timedelta(seconds=presence.lease_seconds)
            later = func.greatest(Run.lease_expires_at, more)
            session.execute(update(Run).where(Run.state == "leased").values(lease_expires_at=later))
            return
    for study_id in sorted(studies):
        with sessions.begin() as session:
            _expire_in(session, study_id)


def _expire_in(session: Session, study_id: str) -> None:
    study = lock(session, study_id)
    query = select(Run).where(Run.study_id == study_id, *_EXPIRED).order_by(Run.id)
    for run in session.scalars(query.with_for_update()).all():
        error = f"lease of worker {run.worker!r} expired: no report within its time"
        end_attempt(session, run, "failed", error=error, retryable=True)
    session.flush()
    advance(session, study)


def tell_finished(sessions: sessionmaker[Session], sampler: Sampler) -> None:
    """Tell Optuna of every finished trial that it has not heard of. Telling twice is harmless."""
    with sessions() as session:
        query = (
            select(Run, Study)
            .join(Study, Study.id == Run.study_id)
            .where(Run.kind == "trial", ~Run.told, Run.state.in_(FINAL_RUN_STATES))
        )
        untold = session.execute(query.order_by(Run.finished_at).limit(100)).all()
    for run, study in untold:
        assert run.trial_number is not None
        end = "diverged" if run.diverged else run.state
        sampler.tell(study.optuna_name, run.trial_number, end, run.val_loss_nats)
        with sessions.begin() as session:
            session.execute(update(Run).where(Run.id == run.id).values(told=True))
