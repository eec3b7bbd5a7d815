"""What every lease request mends first: leases that ran out, ends that Optuna has not heard of."""

from datetime import timedelta

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session, sessionmaker

from service.database.tables import Run, Study
from service.events.audit_log import record_event
from service.leases.attempts import end_attempt, finish_trial_of
from service.leases.presence import Presence
from service.lifecycle import FINAL_RUN_STATES
from service.specs.stored import UnreadableSpecError, log_skipped_study
from service.studies.advance import advance
from service.studies.locks import locked

_TOLD_AT_ONCE = 100
LATE = (Run.state == "leased", Run.lease_expires_at < func.now())
UNTOLD = (Run.kind == "trial", ~Run.told, Run.state.in_(FINAL_RUN_STATES))


def expire(sessions: sessionmaker[Session], presence: Presence) -> frozenset[str]:
    """Take back the runs whose lease has run out, one study and one transaction at a time.

    Returns the studies whose leases are left to a replica of another version.
    """
    late = _late_studies(sessions)  # first: while the database is away nothing is served
    if not presence.note_request():
        _give_time_again(sessions, presence.lease_seconds)
        presence.note_extended()
        late = _late_studies(sessions)
    left: set[str] = set()
    for study_id in late:
        try:
            with sessions.begin() as session:
                _expire_in(session, study_id)
        except UnreadableSpecError as error:
            log_skipped_study(study_id, error.detail)
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
        record_event(
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


def finish_pending_trials(sessions: sessionmaker[Session]) -> None:
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
            finish_trial_of(session, study, run)
