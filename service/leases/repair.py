"""What every lease request mends first: leases that ran out, ends that Optuna has not heard of."""

import threading
import time
from datetime import timedelta

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session, sessionmaker

from service.events import record
from service.lifecycle import FINAL_RUN_STATES
from service.runs.store import end_attempt, tell_end
from service.studies.advance import advance, locked
from service.studies.specs import UnreadableSpecError, note_left
from service.tables import Run, Study

_TOLD_AT_ONCE = 100
LATE = (Run.state == "leased", Run.lease_expires_at < func.now())
UNTOLD = (Run.kind == "trial", ~Run.told, Run.state.in_(FINAL_RUN_STATES))


class Presence:
    """Whether this process and its database have been there for the workers.

    While they were away no worker could renew its lease. After an absence longer than a lease,
    live leases are given their time again instead of being taken back: the absence was ours.

    Every replica knows only of its own absences: one that was merely asked nothing for a while,
    because others were, gives time too. So a lease is given time once, until its worker reports
    again (`runs.graced`): the lease of a dead worker ends within twice its length, however many
    replicas there are and however seldom each is asked.
    """

    def __init__(self, lease_seconds: float) -> None:
        self.lease_seconds = lease_seconds
        self._lock = threading.Lock()
        self._last: float | None = None
        self._owes = False

    def seen(self) -> bool:
        """Note that a request was served just now; False while an absence is not made good.

        The first request after an absence may be a worker's report, which makes nothing good.
        """
        now = time.clock_gettime(time.CLOCK_BOOTTIME)  # goes on while a laptop sleeps
        with self._lock:
            before, self._last = self._last, now
            if before is None or now - before > self.lease_seconds:
                self._owes = True
            return not self._owes

    def made_good(self) -> None:
        """Note that live leases have been given their time again."""
        with self._lock:
            self._owes = False


def expire(sessions: sessionmaker[Session], presence: Presence) -> frozenset[str]:
    """Take back the runs whose lease has run out, one study and one transaction at a time.

    Returns the studies whose leases are left to a replica of another version.
    """
    late = _late_studies(sessions)  # first: while the database is away nothing is served
    if not presence.seen():
        _give_time_again(sessions, presence.lease_seconds)
        presence.made_good()
        late = _late_studies(sessions)
    left: set[str] = set()
    for study_id in late:
        try:
            with sessions.begin() as session:
                _expire_in(session, study_id)
        except UnreadableSpecError as error:
            note_left(study_id, error.detail)
            left.add(study_id)
    return frozenset(left)


def _late_studies(sessions: sessionmaker[Session]) -> list[str]:
    with sessions() as session:
        return sorted(session.scalars(select(Run.study_id).where(*LATE).distinct()))


def _give_time_again(sessions: sessionmaker[Session], lease_seconds: float) -> None:
    """Give live leases their whole time, each once; whoever holds one now renews or ends it."""
    live = select(Run.id).where(Run.state == "leased", ~Run.graced)
    free = live.with_for_update(skip_locked=True).cte()
    more = func.clock_timestamp() + timedelta(seconds=lease_seconds)
    later = func.greatest(Run.lease_expires_at, more)
    with sessions.begin() as session:
        session.execute(
            update(Run)
            .where(Run.id.in_(select(free.c.id)))
            .values(lease_expires_at=later, graced=True)
        )


def _expire_in(session: Session, study_id: str) -> None:
    """Not while another request holds the study: its leases are looked at again in a moment."""
    free = locked(Study.id == study_id).with_for_update(key_share=True, skip_locked=True)
    study = session.scalars(free).one_or_none()
    if study is None:
        return
    query = select(Run).where(Run.study_id == study_id, *LATE).order_by(Run.id)
    for run in session.scalars(query.with_for_update()).all():
        record(
            session,
            "lease.expired",
            study_id=study_id,
            run_id=run.id,
            attempt=run.attempt,
            worker=run.worker,
        )
        error = f"lease of worker {run.worker!r} expired: no report within its time"
        end_attempt(session, run, "failed", error=error, retryable=True)
    session.flush()
    advance(session, study)


def tell_finished(sessions: sessionmaker[Session]) -> None:
    """Tell Optuna of the finished trials that it has not heard of: cancelled ones, mostly.

    Another request may be telling the same, or be ending the run: what is locked is left to it.
    """
    query = (
        select(Run, Study)
        .join(Study, Study.id == Run.study_id)
        .where(*UNTOLD)
        .order_by(Run.id)
        .limit(_TOLD_AT_ONCE)
        .with_for_update(of=Run, skip_locked=True)
    )
    with sessions.begin() as session:
        for run, study in session.execute(query).all():
            tell_end(session, study, run)
