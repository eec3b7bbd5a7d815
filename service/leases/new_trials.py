"""New trials: studies with room for them; how they are sampled, written and leased.

Optuna samples before anything is locked. A single transaction then writes Optuna's trials with
their parameters, the runs, the leases and the events, unless the study has changed since.
"""

import logging
from collections.abc import Generator
from contextlib import contextmanager, suppress
from datetime import datetime

from sqlalchemy import ColumnElement, Integer, any_, bindparam, case, func, select, text
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.orm import Session

from service.access.caller import Caller
from service.database.tables import Run, Study
from service.events.audit_log import NewEvent, new_event, record_events
from service.leases.grants import leased_event, make_lease, read_clock, take_run
from service.leases.requests import Granted, OpenStudy, PendingRequest
from service.leases.services import LeaseServices
from service.lifecycle import LIVE_RUN_STATES
from service.observability import tracing
from service.optuna_bridge.draft_storage import (
    DraftBatch,
    MovedOnError,
    WentBackError,
    write_drafts,
)
from service.optuna_bridge.sampler import TRANSIENT, Sampler, Suggestion
from service.protocol import Lease
from service.runs.store import make_run
from service.specs.stored import UnreadableSpecError, log_skipped_study, parse_stored
from service.specs.study import StudySpec
from service.studies.advance import end_study
from service.studies.locks import lock_study
from warmcore.specs import derive_seed

_log = logging.getLogger(__name__)
_MAX_SAMPLINGS = 5  # then leave the study to the next round: other replicas write faster
_LOCK_TIMEOUT = "2s"
_LOCK_NOT_AVAILABLE = "55P03"

Grants = list[tuple[PendingRequest, Lease]]


class StudyFaultError(Exception):
    """A study cannot start a trial, by its own fault."""

    def __init__(self, study_id: str, error: Exception) -> None:
        self.study_id = study_id
        super().__init__(f"cannot start a trial: {type(error).__name__}: {error}")


def find_open_studies(session: Session, study_filter: ColumnElement[bool]) -> dict[str, OpenStudy]:
    """Return the active studies with room for a trial, by id, the oldest first.

    A study has room while it has fewer live trials than `parallel` and fewer trials than its
    budget. Studies that this version cannot read are skipped.
    """
    found: dict[str, OpenStudy] = {}
    for study, room in session.execute(_OPEN.where(study_filter)):
        try:
            needs = parse_stored(study.spec).resources.trial
        except UnreadableSpecError as error:
            log_skipped_study(study.id, error.detail)
            continue
        found[study.id] = OpenStudy(study=study, room=room, needs=needs)
    return found


# Partial indexes count the live trials. Numbers have no gaps, except where a trial lost its run:
# therefore a highest number of 9 means at most 10 trials. Only a study that seems full is
# counted, since counting 10 000 trials takes ten times as long.
_trials = select(func.count(Run.trial_number)).where(Run.study_id == Study.id)
_newest = select(func.max(Run.trial_number)).where(Run.study_id == Study.id)
_live = sum(_trials.where(Run.state == state).scalar_subquery() for state in LIVE_RUN_STATES)
_hpo = Study.spec["hpo"]
_budget = _hpo["trials"].as_integer()
_left = _budget - 1 - func.coalesce(_newest.scalar_subquery(), -1)
_room = func.least(
    case((_left > 0, _left), else_=_budget - _trials.scalar_subquery()),
    _hpo["parallel"].as_integer() - _live,
)
# Built once: building a statement takes longer than its execution.
_OPEN = select(Study, _room).where(Study.state == "active", _room > 0).order_by(Study.created_at)
# A study's room, and those of the trials that run in Optuna that have a run here.
_running = Run.trial_number == any_(bindparam("running", type_=ARRAY(Integer)))
_with_run = select(Run.trial_number).where(Run.study_id == Study.id, _running).scalar_subquery()
_ROOM_AND_RUNS = select(_room, func.array(_with_run)).where(Study.id == bindparam("study"))
# Locks both rows of a study, ours before Optuna's. The next statement sees the rows that
# another transaction wrote during the wait. The timeout bounds the wait for a replica that hangs.
_LOCK = text("""
SELECT study.state, theirs.study_id AS optuna_id
FROM set_config('lock_timeout', :patience, true), warmscale.studies AS study
JOIN optuna.studies AS theirs ON theirs.study_name = study.optuna_name
WHERE study.id = :study
FOR NO KEY UPDATE OF study, theirs
""")


def start_trials(
    services: LeaseServices, study: Study, requests: list[PendingRequest]
) -> Generator[Granted, None, list[PendingRequest]]:
    """Start a trial for each request while the study has room; yield after each commit of grants.

    Returns the requests that are held up: another replica holds or changes the study, or the
    database refused the trials. A refusal need not be the study's fault: the study goes on.

    Raises:
        StudyFaultError: this study's own fault; other studies can start trials.
    """
    spec, sampler = parse_stored(study.spec), services.sampler
    try:
        for _ in range(_MAX_SAMPLINGS):
            requests = [pending for pending in requests if pending.num_wanted]
            if not requests:
                return []
            with tracing.span("ask", study=study.id, trials=len(requests)):
                batch = sampler.sample_trials(study.optuna_name, spec, len(requests))
            grants: Grants = []
            with (
                suppress(MovedOnError),
                _evict_if_it_went_back(sampler, study),
                services.sessions.begin() as session,
            ):
                grants, requests = _write_trials(
                    session, services, study, spec=spec, batch=batch, requests=requests
                )
            for pending, lease in grants:  # after the commit
                pending.granted.append(lease)
            if grants:
                yield Granted()
    except TRANSIENT as error:
        if isinstance(error, OperationalError) and _sqlstate_of(error) == _LOCK_NOT_AVAILABLE:
            return requests
        raise
    except DBAPIError:
        _log.exception("no trial can be written", extra={"study": study.id})
        sampler.evict_study(study.optuna_name)
        return requests
    except Exception as error:
        raise StudyFaultError(study.id, error) from error
    if requests:
        sampler.evict_study(study.optuna_name)
    return requests


@contextmanager
def _evict_if_it_went_back(sampler: Sampler, study: Study) -> Generator[None]:
    """Evict the study from the sampler's cache if the database turns out to have lost commits."""
    try:
        yield
    except WentBackError:
        sampler.evict_study(study.optuna_name)
        raise


def _sqlstate_of(error: OperationalError) -> str | None:
    return getattr(error.orig, "sqlstate", None)


def _write_trials(
    session: Session,
    services: LeaseServices,
    study: Study,
    *,
    spec: StudySpec,
    batch: DraftBatch,
    requests: list[PendingRequest],
) -> tuple[Grants, list[PendingRequest]]:
    """Write the sampled trials and lease them; return the grants and the unserved requests.

    Writes nothing if fewer trials can start than were sampled: a smaller batch is sampled anew.

    Raises:
        MovedOnError: another transaction has started trials since.
        WentBackError: the database has lost trials that this process had read.
    """
    # Example: two replicas sample trials 7 and 8 of a study. The first locks the study's row,
    # writes two trials, parameters, runs, leases and events, and commits. The second then gets the
    # lock and finds 9 trials where it had read 7: MovedOnError, rollback, sample again. No trial
    # is numbered twice, and no trial is left without its run if a process is killed here.
    locked = session.execute(_LOCK, {"study": study.id, "patience": _LOCK_TIMEOUT}).one_or_none()
    if locked is None or locked.optuna_id != batch.study_id:
        raise WentBackError
    parameters = {"study": study.id, "running": batch.running}
    room, with_run = session.execute(_ROOM_AND_RUNS, parameters).one()
    may_start = max(0, room) if locked.state == "active" else 0
    still = [pending for pending in requests if not pending.is_closed][:may_start]
    if len(still) < len(requests):
        return [], still
    lost = [number for number in batch.running if number not in with_run][: len(requests)]
    if lost:
        suggestions, now = _adopt_trials(session, services.sampler, study, spec, lost)
    else:
        now = write_drafts(session, batch)
        suggestions = [Suggestion(number=d.number, params=d.params) for d in batch.drafts]
    leases = _lease_new_runs(
        session, services, study, spec=spec, suggestions=suggestions, requests=requests, now=now
    )
    return list(zip(requests, leases, strict=False)), requests[len(leases) :]


def _adopt_trials(
    session: Session, sampler: Sampler, study: Study, spec: StudySpec, numbers: list[int]
) -> tuple[list[Suggestion], datetime]:
    """Take over trials that run in Optuna and have no run, and return the database's time.

    An older version wrote the two in separate transactions and could be killed in between.
    """
    try:
        suggestions = [sampler.adopt_trial(study.optuna_name, spec, number) for number in numbers]
    except KeyError as error:  # a standby without this trial was promoted
        raise WentBackError from error
    return suggestions, read_clock(session)


def _lease_new_runs(
    session: Session,
    services: LeaseServices,
    study: Study,
    *,
    spec: StudySpec,
    suggestions: list[Suggestion],
    requests: list[PendingRequest],
    now: datetime,
) -> list[Lease]:
    """Write a leased run for each suggestion, in the order of the requests, and its two events."""
    settings = services.settings
    runs = [_make_trial_run(study, spec, suggestion) for suggestion in suggestions]
    for pending, run in zip(requests, runs, strict=False):
        take_run(run, pending.request, settings, now)
    session.add_all(runs)
    session.flush()
    events = [
        new
        for pending, run in zip(requests, runs, strict=False)
        for new in (queued_event(run, pending.caller), leased_event(run, pending.caller))
    ]
    record_events(session, events)
    return [make_lease(session, settings, run, study, needs=spec.resources.trial) for run in runs]


def queued_event(run: Run, caller: Caller) -> NewEvent:
    """Build the event of a run that has been queued."""
    return new_event(
        "run.queued",
        study_id=run.study_id,
        run_id=run.id,
        actor=caller.key_id,
        trial=run.trial_number,
    )


def fail_study(session: Session, fault: StudyFaultError) -> None:
    """End a study that cannot start a trial as failed, unless it has ended or is paused."""
    _log.error("%s", fault, exc_info=fault.__cause__, extra={"study": fault.study_id})
    study = lock_study(session, fault.study_id)
    if study.state == "active":
        end_study(session, study, "failed", str(fault))


def _make_trial_run(study: Study, spec: StudySpec, suggestion: Suggestion) -> Run:
    seed = derive_seed(spec.hpo.seed, suggestion.number)
    run = make_run(
        study, spec, spec.trial_run(seed).with_params(suggestion.params), suggestion.params
    )
    run.kind, run.trial_number = "trial", suggestion.number
    run.cpus, run.gpus = spec.resources.trial.cpus, spec.resources.trial.gpus
    return run
