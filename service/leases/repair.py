"""Repair at the start of a round: expired leases, and ends of trials that Optuna has not got."""

from datetime import timedelta

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session, sessionmaker

from service.database.tables import Run, Study
from service.events.audit_log import record_event
from service.leases.attempts import end_attempt, finish_trial_of
from service.leases.presence import Presence
from service.lifecycle import FINAL_RUN_STATES
from service.specs.stored import UnreadableSpecError, log_skipped_study
from service.studies.advance import advance_study
from service.studies.locks import select_locked

_MAX_TRIALS = 100
LATE = (Run.state == "leased", Run.lease_expires_at < func.now())
UNREPORTED = (Run.kind == "trial", ~Run.told, Run.state.in_(FINAL_RUN_STATES))


def expire_leases(sessions: sessionmaker[Session], presence: Presence) -> frozenset[str]:
    """Take back the runs of expired leases, in a transaction for each study.

    Returns the ids of the studies that this version cannot read; another replica repairs them.
    """
    # Example: study A has two late leases, study B a single late lease. A's transaction locks A,
    # then its two runs, queues both again and advances A; commit. Then B's. If a worker's `finish`
    # holds A's row, A is skipped without a wait and comes again in the next round.
    late = _find_late_studies(sessions)  # first: while the database is away, no request is noted
    if not presence.note_request():
        _extend_live_leases(sessions, presence.lease_seconds)
        presence.note_extended()
        late = _find_late_studies(sessions)
    skipped: set[str] = set()
    for study_id in late:
        try:
            with sessions.begin() as session:
                _expire_leases_of(session, study_id)
        except UnreadableSpecError as error:
            log_skipped_study(study_id, error.detail)
            skipped.add(study_id)
    return frozenset(skipped)


def _find_late_studies(sessions: sessionmaker[Session]) -> list[str]:
    with sessions() as session:
        return sorted(session.scalars(select(Run.study_id).where(*LATE).distinct()))


def _extend_live_leases(sessions: sessionmaker[Session], lease_seconds: float) -> None:
    """Extend live leases to their whole time, each once; skip runs that a worker writes just now.

    A worker that holds its run's row renews or ends the lease itself.
    """
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


def _expire_leases_of(session: Session, study_id: str) -> None:
    """Expire a study's late leases; do nothing while another request holds the study's row."""
    free = select_locked(Study.id == study_id).with_for_update(key_share=True, skip_locked=True)
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
    advance_study(session, study)


def finish_pending_trials(sessions: sessionmaker[Session]) -> None:
    """Report finished trials to Optuna that it has not got; most of them were cancelled.

    Skips rows that another request has locked: it reports the same trial, or ends the run.
    """
    query = (
        select(Run, Study)
        .join(Study, Study.id == Run.study_id)
        .where(*UNREPORTED)
        .order_by(Run.id)
        .limit(_MAX_TRIALS)
        .with_for_update(of=Run, skip_locked=True)
    )
    with sessions.begin() as session:
        for run, study in session.execute(query).all():
            finish_trial_of(session, study, run)
