"""New trials: which studies may start some, and starting them.

What Optuna suggests is drawn before anything is locked. Then one transaction writes Optuna's trials
with their parameters, the runs, the leases and the events, if the study is still as it was.
"""

import logging
from collections.abc import Generator
from contextlib import contextmanager, suppress

from sqlalchemy import ColumnElement, Integer, any_, bindparam, case, func, select, text
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.orm import Session, sessionmaker

from service.access.caller import Caller
from service.database.tables import Run, Study
from service.events.audit_log import NewEvent, new_event, record_events
from service.leases.grants import clock, lease_of, leased_event, take
from service.leases.requests import OpenStudy, PendingRequest
from service.lifecycle import LIVE_RUN_STATES
from service.observability import tracing
from service.optuna_bridge.draft_storage import Drawn, MovedOnError, WentBackError, write
from service.optuna_bridge.sampler import TRANSIENT, Sampler, Suggestion
from service.protocol import Lease
from service.runs.store import new_run
from service.settings import Settings
from service.specs.stored import UnreadableSpecError, log_skipped_study, parse_stored
from service.specs.study import StudySpec
from service.studies.advance import end
from service.studies.locks import lock
from warmcore.specs import derived_seed

_log = logging.getLogger(__name__)
_DRAWS = 5  # before the next round, where other replicas are always faster
_LOCK_TIMEOUT = "2s"
_LOCK_NOT_AVAILABLE = "55P03"


class StudyFaultError(Exception):
    """A study cannot start a trial, by its own fault."""

    def __init__(self, study_id: str, error: Exception) -> None:
        self.study_id = study_id
        super().__init__(f"cannot start a trial: {type(error).__name__}: {error}")


def openings(session: Session, within: ColumnElement[bool]) -> dict[str, OpenStudy]:
    """Active studies with fewer live trials than `parallel` and fewer trials than their budget.

    The oldest first. What only another version can read is left to that.
    """
    found: dict[str, OpenStudy] = {}
    for study, room in session.execute(_OPEN.where(within)):
        try:
            needs = parse_stored(study.spec).resources.trial
        except UnreadableSpecError as error:
            log_skipped_study(study.id, error.detail)
            continue
        found[study.id] = OpenStudy(study=study, room=room, needs=needs)
    return found


# Live ones are counted by their partial indexes. The newest number bounds how many there are, as
# numbers have no gaps but trials that lost their runs; counting 10 000 takes ten times as long.
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
# Statements of every round are made once: to make them takes longer than to have them answered.
_OPEN = select(Study, _room).where(Study.state == "active", _room > 0).order_by(Study.created_at)
# A study's room, and those of the trials that run for Optuna that have a run.
_running = Run.trial_number == any_(bindparam("running", type_=ARRAY(Integer)))
_known = select(Run.trial_number).where(Run.study_id == Study.id, _running).scalar_subquery()
_STANDING = select(_room, func.array(_known)).where(Study.id == bindparam("study"))
# Both rows of a study, ours before Optuna's. The next statement sees what was written while this
# waited. A replica that commits is waited for, one that hangs is not.
_LOCK = text("""
SELECT study.state, theirs.study_id AS optuna_id
FROM set_config('lock_timeout', :patience, true), warmscale.studies AS study
JOIN optuna.studies AS theirs ON theirs.study_name = study.optuna_name
WHERE study.id = :study
FOR NO KEY UPDATE OF study, theirs
""")


def start(
    sessions: sessionmaker[Session],
    sampler: Sampler,
    settings: Settings,
    study: Study,
    bids: list[PendingRequest],
) -> Generator[float, None, bool]:
    """Start a trial for every bid, as many as there is room for; False if it is held up.

    By others, or by what the database refused: whose fault that is nobody knows, so no study ends
    of it. Yields 0 when some have been granted.

    Raises:
        StudyFaultError: this study's fault, which must not stop the others.
    """
    spec = parse_stored(study.spec)
    try:
        for _ in range(_DRAWS):
            bids = [bid for bid in bids if bid.wanted]
            with tracing.span("ask", study=study.id, trials=len(bids)):
                drawn = sampler.draw(study.optuna_name, spec, len(bids)) if bids else None
            leases: list[tuple[PendingRequest, Lease]] = []
            if drawn is None:
                return True
            with suppress(MovedOnError), _forgetting(sampler, study), sessions.begin() as session:
                leases, bids = _start(
                    session, sampler, settings, study, spec=spec, drawn=drawn, bids=bids
                )
            for bid, lease in leases:  # after the commit
                bid.granted.append(lease)
            if leases:
                yield 0.0
    except TRANSIENT as error:
        if isinstance(error, OperationalError) and _code(error) == _LOCK_NOT_AVAILABLE:
            return False
        raise
    except DBAPIError:
        _log.exception("no trial can be written", extra={"study": study.id})
        sampler.forget(study.optuna_name)
        return False
    except Exception as error:
        raise StudyFaultError(study.id, error) from error
    if bids:
        sampler.forget(study.optuna_name)
    return not bids


@contextmanager
def _forgetting(sampler: Sampler, study: Study) -> Generator[None]:
    """Forget what is known of a study that went back in time while inside."""
    try:
        yield
    except WentBackError:
        sampler.forget(study.optuna_name)
        raise


def _code(error: OperationalError) -> str | None:
    return getattr(error.orig, "sqlstate", None)


def _start(
    session: Session,
    sampler: Sampler,
    settings: Settings,
    study: Study,
    *,
    spec: StudySpec,
    drawn: Drawn,
    bids: list[PendingRequest],
) -> tuple[list[tuple[PendingRequest, Lease]], list[PendingRequest]]:
    """Grants, and the bids that are to be drawn for again: the study was not as it was."""
    held = session.execute(_LOCK, {"study": study.id, "patience": _LOCK_TIMEOUT}).one_or_none()
    if held is None or held.optuna_id != drawn.study_id:
        raise WentBackError
    standing = {"study": study.id, "running": drawn.running}
    room, known = session.execute(_STANDING, standing).one()
    still = [bid for bid in bids if not bid.gone][: max(0, room) if held.state == "active" else 0]
    if len(still) < len(bids):
        return [], still
    # Trials that run for Optuna but have no run: an older version was killed in between.
    lost = [number for number in drawn.running if number not in known][: len(bids)]
    try:
        suggestions = [sampler.adopt(study.optuna_name, spec, number) for number in lost]
    except KeyError as error:  # Optuna has it no more: a standby without it was promoted
        raise WentBackError from error
    if suggestions:
        now = clock(session)
    else:
        now = write(session, drawn)
        suggestions = [Suggestion(number=d.number, params=d.params) for d in drawn.drafts]
    runs = [_trial_run(study, spec, suggestion) for suggestion in suggestions]
    for bid, run in zip(bids, runs, strict=False):
        take(run, bid.request, settings, now)
    session.add_all(runs)
    session.flush()
    events = [
        one
        for bid, run in zip(bids, runs, strict=False)
        for one in (queued_event(run, bid.caller), leased_event(run, bid.caller))
    ]
    record_events(session, events)
    leases = [lease_of(session, settings, run, study, needs=spec.resources.trial) for run in runs]
    return list(zip(bids, leases, strict=False)), bids[len(leases) :]


def queued_event(run: Run, caller: Caller) -> NewEvent:
    """Build the event of a run that has been queued."""
    return new_event(
        "run.queued",
        study_id=run.study_id,
        run_id=run.id,
        actor=caller.key_id,
        trial=run.trial_number,
    )


def fail(session: Session, fault: StudyFaultError) -> None:
    """End a study that cannot start a trial."""
    _log.error("%s", fault, exc_info=fault.__cause__, extra={"study": fault.study_id})
    study = lock(session, fault.study_id)
    if study.state == "active":
        end(session, study, "failed", str(fault))


def _trial_run(study: Study, spec: StudySpec, suggestion: Suggestion) -> Run:
    seed = derived_seed(spec.hpo.seed, suggestion.number)
    run = new_run(
        study, spec, spec.trial_run(seed).with_params(suggestion.params), suggestion.params
    )
    run.kind, run.trial_number = "trial", suggestion.number
    run.cpus, run.gpus = spec.resources.trial.cpus, spec.resources.trial.gpus
    return run
