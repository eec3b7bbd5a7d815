"""Leasing: who trains what. No background loop: every round of requests also repairs what it finds.

Locks are taken in one order, the study's row before a run's, or skipped when held, so that two
requests cannot wait for each other.
"""

from collections.abc import Generator, Iterable
from typing import TYPE_CHECKING, get_args

from sqlalchemy import ColumnElement, func, select
from sqlalchemy.orm import Session, sessionmaker
from starlette.datastructures import State

from service.access.lookup import find_study_id
from service.database.tables import Run, Study
from service.events.audit_log import record_events
from service.leases import new_trials
from service.leases.grants import clock, lease_of, leased_event, take
from service.leases.repair import LATE, UNTOLD, expire, finish_pending_trials
from service.leases.requests import PendingRequest, assign_trials
from service.optuna_bridge.sampler import Sampler
from service.problems import Problem
from service.protocol import Lease, RunKind
from service.settings import Settings
from service.specs.stored import log_skipped_study
from service.specs.study import StudyResources
from warmcore.specs import RunSpec

if TYPE_CHECKING:
    from service.leases.presence import Presence

# A study that has ended may still have targets that were started by hand.
_LEASED_FROM = ("active", "completed", "failed")
_SOON_SECONDS = 0.1
_WAITING = (
    select(Run, Study)
    .join(Study, Study.id == Run.study_id)
    .where(Run.state == "queued", Run.available_at <= func.now(), Study.state.in_(_LEASED_FROM))
)
_LOOK = select(
    select(Run.id).where(*LATE).exists(),
    select(Run.id).where(*UNTOLD).exists(),
    _WAITING.exists(),
)


def serve(state: State, bids: list[PendingRequest]) -> Generator[float | None]:
    """Grant every bid in its turn up to `max_runs` runs that fit together, as far as there are any.

    Yields whenever something has been granted, for that to be answered before more is drawn: 0. At
    last yields the seconds until there may be more; None if the clock alone will bring none.

    Runs that wait come before new trials. Expired leases are taken back first, and finished trials
    that Optuna has not heard of are told. What has been granted stands, whatever fails after it:
    nobody else could train it. A bid for a study that does not exist gets that error.
    Whatever only reads is one of `statements`, which need no BEGIN and no ROLLBACK.
    """
    sessions: sessionmaker[Session] = state.sessions
    statements: sessionmaker[Session] = state.statements
    presence: Presence = state.presence
    _look_up(statements, bids)
    late, untold, waiting = _look(statements)
    left: frozenset[str] = frozenset()
    if late or not presence.note_request():
        left = expire(sessions, presence)
        _, untold, waiting = _look(statements)
    if untold:
        finish_pending_trials(sessions)
    if waiting:
        _lease_queued(sessions, state.settings, bids)
        if any(bid.granted for bid in bids):
            yield 0.0
    started = _start_trials(sessions, statements, state.sampler, state.settings, bids)
    held_up = not (yield from started)
    if any(bid.wanted for bid in bids):
        with statements() as session:
            due = _SOON_SECONDS if held_up else _due_seconds(session, left)
        yield due


def _look(statements: sessionmaker[Session]) -> tuple[bool, bool, bool]:
    """Whether leases have run out, Optuna has not heard of ends, and runs wait to be leased."""
    with statements() as session:
        found = session.execute(_LOOK).one()
    return found[0], found[1], found[2]


def _look_up(statements: sessionmaker[Session], bids: Iterable[PendingRequest]) -> None:
    known: dict[tuple[str | None, str | None], tuple[ColumnElement[bool], str]] = {}
    for bid in bids:
        if bid.within is not None:
            continue
        whose = bid.caller.project, bid.request.study
        try:
            if whose not in known:
                with statements() as session:
                    known[whose] = _within(session, bid)
            bid.within, bid.scope = known[whose]
        except Problem as problem:
            bid.error = problem


def _within(session: Session, bid: PendingRequest) -> tuple[ColumnElement[bool], str]:
    """The studies that a bid takes from, one or its caller's, and a name for them."""
    if bid.request.study is None:
        return bid.caller.studies, f"project:{bid.caller.project}"
    id_ = find_study_id(session, bid.caller, bid.request.study)
    return Study.id == id_, id_


def _lease_queued(
    sessions: sessionmaker[Session], settings: Settings, bids: list[PendingRequest]
) -> None:
    granted: list[tuple[PendingRequest, Lease]] = []
    nothing_left: set[tuple[object, ...]] = set()
    with sessions.begin() as session:
        for bid in bids:
            alike = (bid.scope, bid.request.kinds, bid.request.resources)
            if bid.wanted and alike not in nothing_left:
                leases = _queued_for(session, settings, bid)
                granted += [(bid, lease) for lease in leases]
                if not leases:
                    nothing_left.add(alike)
    for bid, lease in granted:
        bid.granted.append(lease)


def _queued_for(session: Session, settings: Settings, bid: PendingRequest) -> list[Lease]:
    granted: list[Lease] = []
    unreadable: list[str] = []
    while True:
        num_unreadable = len(unreadable)
        granted += _grant_waiting(session, settings, bid, granted, unreadable)
        if len(unreadable) == num_unreadable:
            return granted


def _grant_waiting(
    session: Session,
    settings: Settings,
    bid: PendingRequest,
    before: list[Lease],
    unreadable: list[str],
) -> list[Lease]:
    """Grant what waits, beside what was granted `before`; note what this version cannot read.

    A run may be of a newer replica's making, while an installation is upgraded: it is left to one
    of those, and must not hold up the others.
    """
    assert bid.within is not None
    free, now = bid.free, clock(session)
    for lease in before:
        free = free.subtract(lease.resources)
    kinds = get_args(RunKind) if bid.request.kinds is None else bid.request.kinds
    query = (
        _WAITING.where(Run.cpus <= free.cpus, Run.gpus <= free.gpus, bid.within)
        .where(Run.kind.in_(kinds), Run.id.not_in(unreadable))
        .order_by(Run.created_at, Run.id)
        .limit(bid.wanted - len(before))
        .with_for_update(of=Run, skip_locked=True)
    )
    granted: list[Lease] = []
    for run, study in session.execute(query):
        try:
            needs = StudyResources.model_validate(study.spec["resources"]).of(run.kind)
            RunSpec.model_validate(run.spec)
        except (KeyError, ValueError) as error:
            log_skipped_study(study.id, f"its run {run.id}: {type(error).__name__}")
            unreadable.append(run.id)
            continue
        if needs.fits(free):
            take(run, bid.request, settings, now)
            session.flush()
            record_events(session, [leased_event(run, bid.caller)])
            granted.append(lease_of(session, settings, run, study, needs=needs))
            free = free.subtract(needs)
    return granted


def _start_trials(
    sessions: sessionmaker[Session],
    statements: sessionmaker[Session],
    sampler: Sampler,
    settings: Settings,
    bids: list[PendingRequest],
) -> Generator[float, None, bool]:
    """Start trials until the bids are served or no study has room; False if some are held up."""
    held_up: set[str] = set()
    while True:
        try:
            allotted = _allotted(statements, bids, held_up)
            if not allotted:
                return not held_up
            for study, takers in allotted:
                if not (yield from new_trials.start(sessions, sampler, settings, study, takers)):
                    held_up.add(study.id)
        except new_trials.StudyFaultError as fault:
            with sessions.begin() as session:
                new_trials.fail(session, fault)


def _allotted(
    statements: sessionmaker[Session], bids: list[PendingRequest], held_up: set[str]
) -> list[tuple[Study, list[PendingRequest]]]:
    takers = [bid for bid in bids if bid.wanted and bid.takes("trial")]
    if not takers:
        return []
    scopes = {bid.scope: bid.within for bid in takers if bid.within is not None}
    with statements() as session:
        found = {scope: new_trials.openings(session, within) for scope, within in scopes.items()}
    openings = {id_: o for of in found.values() for id_, o in of.items() if id_ not in held_up}
    studies = {scope: [id_ for id_ in of if id_ in openings] for scope, of in found.items()}
    allotted = assign_trials(takers, openings, studies)
    return [(openings[id_].study, bids) for id_, bids in allotted.items()]


def _due_seconds(session: Session, left: Iterable[str]) -> float | None:
    """Seconds until a retry is due or a lease runs out, but for studies left to other versions."""
    retry = select(func.min(Run.available_at)).where(
        Run.state == "queued", Run.available_at > func.now()
    )
    expiry = select(func.min(Run.lease_expires_at)).where(
        Run.state == "leased", Run.study_id.not_in(left)
    )
    due = func.least(retry.scalar_subquery(), expiry.scalar_subquery())
    seconds = session.scalar(select(func.extract("epoch", due - func.clock_timestamp())))
    # What is overdue is held by another request: it is looked at again, but not at once.
    return None if seconds is None else float(seconds) if seconds > 0 else _SOON_SECONDS
