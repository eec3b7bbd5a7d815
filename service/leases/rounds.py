"""A round of the lease queue: repair, grant queued runs, start new trials.

No background loop repairs or grants: both happen only while a request waits.

Every transaction locks a study's row before the rows of its runs, or skips a row that is locked.
Therefore two requests never wait for each other.
"""

from collections.abc import Generator, Iterable
from typing import NamedTuple

from sqlalchemy import ColumnElement, func, select
from sqlalchemy.orm import Session, sessionmaker

from service.access.lookup import find_study_id
from service.database.tables import Run, Study
from service.leases import new_trials
from service.leases.grants import QUEUED, grant_queued_runs
from service.leases.repair import LATE, UNREPORTED, expire_leases, finish_pending_trials
from service.leases.requests import Granted, PendingRequest, RoundEnd, assign_trials
from service.leases.services import LeaseServices
from service.problems import Problem

_SOON_SECONDS = 0.1
_DUE_WORK = select(
    select(Run.id).where(*LATE).exists(),
    select(Run.id).where(*UNREPORTED).exists(),
    QUEUED.exists(),
)


class _DueWork(NamedTuple):
    """The work that is due: leases to expire, ends of trials to report, queued runs to grant."""

    has_late: bool
    has_unreported: bool
    has_queued: bool


def serve_round(
    services: LeaseServices, requests: list[PendingRequest]
) -> Generator[Granted, None, RoundEnd]:
    """Grant each request, in order of arrival, up to `max_runs` runs that fit its resources.

    Yields `Granted` after each commit of grants: the caller answers these requests before further
    trials are sampled. A grant that has committed stands although a later step fails, since no
    other worker could train its run. A request for an unknown study gets that error.
    """
    # Example: r1, r2 and r3 want a run each; a run is queued, and a study has room for two trials.
    #   repair   `_find_due_work` reads once; mostly nothing is late and nothing is written
    #   queued   r1 is granted the queued run; commit; yield Granted
    #   new      r2 and r3 are granted trials 7 and 8 in the same commit; yield Granted
    _find_study_filters(services.statements, requests)
    has_queued, skipped_studies = _repair(services)
    if has_queued:
        grant_queued_runs(services, requests)
        if any(pending.granted for pending in requests):
            yield Granted()
    held_up = yield from _start_trials(services, requests)
    if not any(pending.num_wanted for pending in requests):
        return RoundEnd(due_seconds=None)
    if held_up:
        return RoundEnd(due_seconds=_SOON_SECONDS)
    with services.statements() as session:
        return RoundEnd(due_seconds=_find_due_seconds(session, skipped_studies))


def _repair(services: LeaseServices) -> tuple[bool, frozenset[str]]:
    """Repair what is due; return whether runs are queued, and the studies left as they are."""
    due = _find_due_work(services.statements)
    skipped_studies: frozenset[str] = frozenset()
    if due.has_late or not services.presence.note_request():
        skipped_studies = expire_leases(services.sessions, services.presence)
        due = _find_due_work(services.statements)
    if due.has_unreported:
        finish_pending_trials(services.sessions)
    return due.has_queued, skipped_studies


def _find_due_work(statements: sessionmaker[Session]) -> _DueWork:
    with statements() as session:
        return _DueWork(*session.execute(_DUE_WORK).one())


def _find_study_filters(
    statements: sessionmaker[Session], requests: Iterable[PendingRequest]
) -> None:
    """Find each new request's studies; requests of the same project and study share it."""
    found: dict[tuple[str | None, str | None], tuple[ColumnElement[bool], str]] = {}
    for pending in requests:
        if pending.study_filter is not None:
            continue
        key = pending.caller.project, pending.request.study
        try:
            if key not in found:
                with statements() as session:
                    found[key] = _find_study_filter(session, pending)
            pending.study_filter, pending.scope = found[key]
        except Problem as problem:
            pending.error = problem


def _find_study_filter(
    session: Session, pending: PendingRequest
) -> tuple[ColumnElement[bool], str]:
    """Return the filter for the request's study, or else for all of its caller's; and a name."""
    if pending.request.study is None:
        return pending.caller.study_filter, f"project:{pending.caller.project}"
    id_ = find_study_id(session, pending.caller, pending.request.study)
    return Study.id == id_, id_


def _start_trials(
    services: LeaseServices, requests: list[PendingRequest]
) -> Generator[Granted, None, set[str]]:
    """Start trials until the requests are served or no study has room; return the held-up studies.

    A study is held up while another replica holds its row, or when the database refused its
    trials. A study that cannot start a trial by its own fault ends as failed.
    """
    held_up: set[str] = set()
    while True:
        try:
            assigned = _assign_studies(services.statements, requests, held_up)
            if not assigned:
                return held_up
            for study, takers in assigned:
                if (yield from new_trials.start_trials(services, study, takers)):
                    held_up.add(study.id)
        except new_trials.StudyFaultError as fault:
            with services.sessions.begin() as session:
                new_trials.fail_study(session, fault)


def _assign_studies(
    statements: sessionmaker[Session], requests: list[PendingRequest], held_up: set[str]
) -> list[tuple[Study, list[PendingRequest]]]:
    """Return the studies that can start trials now, each with the requests that get them."""
    takers = [pending for pending in requests if pending.num_wanted and pending.accepts("trial")]
    if not takers:
        return []
    filters = {p.scope: p.study_filter for p in takers if p.study_filter is not None}
    with statements() as session:
        found = {
            scope: new_trials.find_open_studies(session, study_filter)
            for scope, study_filter in filters.items()
        }
    open_studies = {
        id_: opening
        for of_scope in found.values()
        for id_, opening in of_scope.items()
        if id_ not in held_up
    }
    ids_of_scope = {
        scope: [id_ for id_ in of_scope if id_ in open_studies] for scope, of_scope in found.items()
    }
    assigned = assign_trials(takers, open_studies, ids_of_scope)
    return [(open_studies[id_].study, requests) for id_, requests in assigned.items()]


def _find_due_seconds(session: Session, skipped_studies: Iterable[str]) -> float | None:
    """Return the seconds until a retry is due or a lease expires; None if neither is scheduled.

    Leases of skipped studies do not count: a replica of another version expires them.
    """
    retry = select(func.min(Run.available_at)).where(
        Run.state == "queued", Run.available_at > func.now()
    )
    expiry = select(func.min(Run.lease_expires_at)).where(
        Run.state == "leased", Run.study_id.not_in(skipped_studies)
    )
    due = func.least(retry.scalar_subquery(), expiry.scalar_subquery())
    seconds = session.scalar(select(func.extract("epoch", due - func.clock_timestamp())))
    if seconds is None:
        return None
    # An overdue lease is held by another request's transaction: try again soon, not at once.
    return float(seconds) if seconds > 0 else _SOON_SECONDS
