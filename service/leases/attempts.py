"""Renew a lease, finish a run: the writes that keep or end an attempt."""

from collections.abc import Iterable
from datetime import timedelta

from sqlalchemy import Text, and_, bindparam, func, or_, select, update
from sqlalchemy.orm import Session

from service.access.caller import Caller
from service.access.lookup import find_run
from service.database.tables import Run, Study
from service.events.audit_log import record_event
from service.lifecycle import FINAL_RUN_STATES, retry_delay_seconds, state_after_attempt
from service.optuna_bridge.finish_trial import finish_trial, trial_end
from service.problems import bad_field, conflict, not_found
from service.protocol import Decision, FinishRequest, Lease, Outcome
from service.studies import branches
from service.studies.advance import advance_study
from service.studies.locks import select_locked

# Built once: building these statements takes as long as executing them.
_ITS_STUDY = select(Run.study_id).where(Run.id == bindparam("run")).scalar_subquery()
_PROJECT = bindparam("project", type_=Text())
_WITHIN = or_(_PROJECT.is_(None), Study.project == _PROJECT)  # never wait for another project's row
_LOCKED_STUDY = select_locked(and_(Study.id == _ITS_STUDY, _WITHIN))
_LOCKED_RUN = (
    select(Run)
    .where(Run.id == bindparam("run"))
    .with_for_update()
    .execution_options(populate_existing=True)
)


def renew_lease(
    session: Session, caller: Caller, run_id: str, token: str, lease_seconds: float
) -> Run | Decision:
    """Renew a lease and return its run, locked; return "cancel" if the run was cancelled.

    A lease that has run out is renewed too, unless another worker has leased the run since.

    Raises:
        Problem: 404 for an unknown run; 409 for a token that another attempt has replaced.
    """
    run = session.scalars(
        update(Run)
        .where(Run.id == run_id, Run.lease_token == token, Run.state == "leased", caller.run_filter)
        # Not now(), the time at which this transaction began: it may have waited for the row.
        .values(
            lease_expires_at=func.clock_timestamp() + timedelta(seconds=lease_seconds),
            graced=False,
        )
        .returning(Run)
    ).one_or_none()
    return decide_after_end(session, caller, run_id, token) if run is None else run


def decide_after_end(session: Session, caller: Caller, run_id: str, token: str) -> Decision:
    """Return "cancel" to the last worker of a cancelled run; raise for every other ended lease.

    Raises:
        Problem: 404 for an unknown run; 409 for a token that another attempt has replaced.
    """
    if _final_state_under(find_run(session, caller, run_id), token) == "cancelled":
        return "cancel"
    raise _make_stale_problem(run_id)


def _final_state_under(run: Run, token: str) -> str | None:
    """Return the run's final state if its last lease had this token; None for a stale token."""
    is_last = run.lease_token == token and run.state in FINAL_RUN_STATES
    return run.state if is_last else None


def _make_stale_problem(run_id: str) -> Exception:
    return conflict("stale-lease", f"run {run_id} is no longer leased under this token; stop")


def finish_attempt(
    session: Session, caller: Caller, run_id: str, token: str, request: FinishRequest
) -> str:
    """End an attempt and advance its study; return the run's state.

    Sending the same end twice changes nothing.

    Raises:
        Problem: 404 for an unknown run; 409 for a stale token; 422 for a success without its loss,
            or of a trunk without its branches.
    """
    if request.outcome == "succeeded" and request.val_loss_nats is None:
        raise bad_field("val_loss_nats", None, "a succeeded run has a final validation loss")
    study = _lock_study_of(session, caller, run_id)
    run = session.scalars(_LOCKED_RUN, {"run": run_id}).one()
    if run.lease_token != token or run.state != "leased":
        final_state = _final_state_under(run, token)
        if final_state is None:
            raise _make_stale_problem(run_id)
        return final_state
    if request.outcome == "succeeded" and run.kind == "target":
        branches.check_all_started(session, run)
    _copy_results(run, request)
    with session.no_autoflush:  # a single UPDATE of the run, at the end
        end_attempt(session, run, request.outcome, error=request.error, retryable=request.retryable)
        finish_trial_of(session, study, run)
    session.flush()
    advance_study(session, study)
    return run.state


def _copy_results(run: Run, request: FinishRequest) -> None:
    if request.val_loss_nats is not None:
        run.val_loss_nats = request.val_loss_nats
    if request.provenance is not None:
        run.provenance = request.provenance.model_dump(mode="json")
    if request.timing is not None:
        run.timing = request.timing.model_dump(mode="json")


def _lock_study_of(session: Session, caller: Caller, run_id: str) -> Study:
    parameters = {"run": run_id, "project": caller.project}
    study = session.scalars(_LOCKED_STUDY, parameters).one_or_none()
    if study is None:
        raise not_found("run", run_id)
    return study


def release_leases(session: Session, caller: Caller, leases: Iterable[Lease]) -> None:
    """Queue again the runs granted to a client that has left; that costs no attempt."""
    for lease in leases:
        request = FinishRequest(outcome="released")
        finish_attempt(session, caller, lease.run_id, lease.lease_token, request)


def finish_trial_of(session: Session, study: Study, run: Run) -> None:
    """Report the end of the run's trial to Optuna in this transaction, if it has ended."""
    if run.trial_number is None or run.state not in FINAL_RUN_STATES:
        return
    run.told = finish_trial(
        session,
        study.optuna_name,
        run.trial_number,
        trial_end(run.state, diverged=run.diverged),
        value=run.val_loss_nats,
        diverged=run.diverged,
    )


def end_attempt(
    session: Session, run: Run, outcome: Outcome, *, error: str | None, retryable: bool
) -> None:
    """Move a leased run to the state that follows this outcome; it and its study are locked."""
    run.failures += outcome == "failed"
    state = state_after_attempt(
        outcome, retryable=retryable, failures=run.failures, max_attempts=run.max_attempts
    )
    run.state, run.error, run.diverged = state, error, outcome == "diverged"
    run.lease_expires_at = None
    if state == "queued":
        run.lease_token = None
        delay = retry_delay_seconds(run.failures) if outcome == "failed" else 0.0
        run.available_at = func.now() + timedelta(seconds=delay)
    else:
        run.finished_at = func.now()
    record_event(
        session,
        f"run.{state}",
        study_id=run.study_id,
        run_id=run.id,
        attempt=run.attempt,
        outcome=outcome,
        error=error,
        val_loss_nats=run.val_loss_nats,
        worker=run.worker,
    )
