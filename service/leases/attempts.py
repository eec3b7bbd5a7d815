"""Renew a lease, publish a checkpoint, finish a run: whatever keeps or ends an attempt."""

from datetime import timedelta

from sqlalchemy import Text, and_, bindparam, func, or_, select, update
from sqlalchemy.orm import Session

from service.access.caller import Caller
from service.access.lookup import find_run
from service.database.tables import Checkpoint, Run, Study
from service.events.audit_log import record_event
from service.lifecycle import FINAL_RUN_STATES, retry_delay_seconds, state_after_attempt
from service.optuna_bridge.finish_trial import end_of, tell
from service.problems import bad_field, conflict, not_found
from service.protocol import (
    CheckpointReport,
    Decision,
    FinishRequest,
    Outcome,
)
from service.studies import branches
from service.studies.advance import advance
from service.studies.locks import locked

_KEPT_CHECKPOINTS = 2
# Made once: to make them takes as long as to have them answered.
_ITS_STUDY = select(Run.study_id).where(Run.id == bindparam("run")).scalar_subquery()
_PROJECT = bindparam("project", type_=Text())
_WITHIN = or_(_PROJECT.is_(None), Study.project == _PROJECT)  # no other project's is waited for
_LOCKED_STUDY = locked(and_(Study.id == _ITS_STUDY, _WITHIN))
_LOCKED_RUN = (
    select(Run)
    .where(Run.id == bindparam("run"))
    .with_for_update()
    .execution_options(populate_existing=True)
)


def renew(
    session: Session, caller: Caller, run_id: str, token: str, lease_seconds: float
) -> Run | Decision:
    """Renew a lease and return its run, locked; "cancel" when the run was cancelled meanwhile.

    A lease that has run out but was not taken by anybody else yet is still good.

    Raises:
        Problem: 404 for no such run; 409 for a token that another attempt has replaced.
    """
    run = session.scalars(
        update(Run)
        .where(Run.id == run_id, Run.lease_token == token, Run.state == "leased", caller.runs)
        # Not now(), which is when this transaction began: it may have waited for the row.
        .values(
            lease_expires_at=func.clock_timestamp() + timedelta(seconds=lease_seconds),
            graced=False,
        )
        .returning(Run)
    ).one_or_none()
    return after_end(session, caller, run_id, token) if run is None else run


def after_end(session: Session, caller: Caller, run_id: str, token: str) -> Decision:
    """What a worker hears whose lease does not stand: "cancel" when its run was cancelled.

    Raises:
        Problem: 404 for no such run; 409 for a token that another attempt has replaced.
    """
    if _ended(find_run(session, caller, run_id), token) == "cancelled":
        return "cancel"
    raise _stale(run_id)


def _ended(run: Run, token: str) -> str | None:
    """The final state of a run whose last lease was this one; None for a lease that is stale."""
    mine = run.lease_token == token and run.state in FINAL_RUN_STATES
    return run.state if mine else None


def _stale(run_id: str) -> Exception:
    return conflict("stale-lease", f"run {run_id} is no longer leased under this token; stop")


def publish(session: Session, run: Run, checkpoint: CheckpointReport) -> tuple[str, ...]:
    """Write a checkpoint's row; return the URI of the one that it pushed out, if it did.

    Where it is a trunk's and one of its budgets cools down from here, that run is enqueued too.

    The final one and the newest two are kept: newest by attempt, since an attempt that could use
    none of those before it counts its steps from the start. Publishing the same again changes
    nothing, but that it may turn out to have been the last, and has the same answer: the first may
    have been lost. The run's row is locked: no other request can be here.

    Raises:
        Problem: 409 when this attempt has published another checkpoint of this step.
    """
    at = (Checkpoint.run_id == run.id, Checkpoint.attempt == run.attempt)
    row = session.scalars(
        select(Checkpoint).where(*at, Checkpoint.step == checkpoint.step)
    ).one_or_none()
    if row is None:
        values = {"run_id": run.id, "attempt": run.attempt, **checkpoint.model_dump()}
        row = Checkpoint(**values)
        session.add(row)
        session.flush()
        record_event(
            session,
            "run.checkpoint",
            study_id=run.study_id,
            run_id=run.id,
            attempt=run.attempt,
            step=checkpoint.step,
        )
    elif row.hash != checkpoint.hash:
        detail = f"run {run.id} has published step {checkpoint.step} with hash {row.hash}"
        raise conflict("checkpoint-exists", detail)
    else:
        row.final = row.final or checkpoint.final
    branches.enqueue(session, run, row)
    newest = select(Checkpoint).where(Checkpoint.run_id == run.id)
    newest = newest.order_by(Checkpoint.attempt.desc(), Checkpoint.step.desc())
    # Held while it is decided: a target that starts from it has it named, or finds it gone.
    oldest = newest.offset(_KEPT_CHECKPOINTS).limit(1).with_for_update()
    old = session.scalars(oldest).one_or_none()
    if old is None or old.final or _is_base(session, old):
        return ()
    old.superseded = True
    return (old.uri,)


def _is_base(session: Session, checkpoint: Checkpoint) -> bool:
    """Whether a run grows from it."""
    query = select(Run.id).where(Run.base_checkpoint_id == checkpoint.id).limit(1)
    return session.scalar(query) is not None


def finish(session: Session, caller: Caller, run_id: str, token: str, finish: FinishRequest) -> str:
    """End an attempt, and move its study on. Sending the same end twice changes nothing.

    Raises:
        Problem: 404 for no such run, 409 for a stale token, 422 for a success without its loss or
            of a trunk without its branches.
    """
    if finish.outcome == "succeeded" and finish.val_loss_nats is None:
        raise bad_field("val_loss_nats", None, "a succeeded run has a final validation loss")
    study = _locked_study(session, caller, run_id)
    run = session.scalars(_LOCKED_RUN, {"run": run_id}).one()
    if run.lease_token != token or run.state != "leased":
        ended = _ended(run, token)
        if ended is None:
            raise _stale(run_id)
        return ended
    if finish.outcome == "succeeded" and run.kind == "target":
        branches.check_all_started(session, run)
    if finish.val_loss_nats is not None:
        run.val_loss_nats = finish.val_loss_nats
    if finish.provenance is not None:
        run.provenance = finish.provenance.model_dump(mode="json")
    if finish.timing is not None:
        run.timing = finish.timing.model_dump(mode="json")
    with session.no_autoflush:  # one UPDATE of the run, when all is known
        end_attempt(session, run, finish.outcome, error=finish.error, retryable=finish.retryable)
        finish_trial_of(session, study, run)
    session.flush()
    advance(session, study)
    return run.state


def _locked_study(session: Session, caller: Caller, run_id: str) -> Study:
    whose = {"run": run_id, "project": caller.project}
    study = session.scalars(_LOCKED_STUDY, whose).one_or_none()
    if study is None:
        raise not_found("run", run_id)
    return study


def finish_trial_of(session: Session, study: Study, run: Run) -> None:
    """Tell Optuna of a trial's end in this transaction, if it has come to one."""
    if run.trial_number is None or run.state not in FINAL_RUN_STATES:
        return
    run.told = tell(
        session,
        study.optuna_name,
        run.trial_number,
        end_of(run.state, diverged=run.diverged),
        value=run.val_loss_nats,
        diverged=run.diverged,
    )


def end_attempt(
    session: Session, run: Run, outcome: Outcome, *, error: str | None, retryable: bool
) -> None:
    """Move a leased run to where this outcome leads. Its study and itself are locked."""
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
