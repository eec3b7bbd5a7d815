"""Publishing a checkpoint under a lease: its row, its branch, and the checkpoint it supersedes."""

from sqlalchemy import select
from sqlalchemy.orm import Session

from service.access.caller import Caller
from service.access.paths import check_published
from service.database.tables import Checkpoint, Run
from service.events.audit_log import record_event
from service.leases.attempts import renew_lease
from service.leases.grants import artifact_uri
from service.problems import conflict
from service.protocol import CheckpointReply, CheckpointReport
from service.settings import Settings
from service.studies import branches

_KEPT_CHECKPOINTS = 2


def publish_checkpoint(
    session: Session,
    caller: Caller,
    run_id: str,
    token: str,
    report: CheckpointReport,
    *,
    settings: Settings,
) -> CheckpointReply:
    """Renew the lease and write a checkpoint, after its worker has written the files.

    Raises:
        Problem: 404 for an unknown run; 409 for a stale token or a second checkpoint of this step;
            422 for a URI outside the attempt's folder.
    """
    # As everywhere, the study's row is locked before the run's.
    branches.lock_branching_study(session, run_id, report.step)
    run = renew_lease(session, caller, run_id, token, settings.lease_seconds)
    if not isinstance(run, Run):
        return CheckpointReply(decision=run)
    check_published(report.uri, artifact_uri(settings, run), run.id)
    return CheckpointReply(decision="continue", superseded=write_checkpoint(session, run, report))


def write_checkpoint(session: Session, run: Run, report: CheckpointReport) -> tuple[str, ...]:
    """Write a checkpoint's row; return the URI of the checkpoint that it supersedes, if any.

    If the run is a trunk and one of its budgets cools down from this step, its run is enqueued.

    The final checkpoint and the newest two are kept. Newest means the latest attempt first: an
    attempt that could load no earlier checkpoint counts its steps from 0 again. The run's row is
    locked: no other request writes its checkpoints at the same time.

    Publishing the same checkpoint again has the same answer, since the first answer may have been
    lost. It changes nothing, except that the checkpoint may turn out to be the final one.

    Raises:
        Problem: 409 when this attempt has published another checkpoint of this step.
    """
    row = _find_published(session, run, report.step)
    if row is None:
        row = _insert_checkpoint(session, run, report)
    elif row.hash != report.hash:
        detail = f"run {run.id} has published step {report.step} with hash {row.hash}"
        raise conflict("checkpoint-exists", detail)
    else:
        row.final = row.final or report.final
    branches.enqueue_branch(session, run, row)
    return _supersede_oldest(session, run)


def _find_published(session: Session, run: Run, step: int) -> Checkpoint | None:
    of_attempt = (Checkpoint.run_id == run.id, Checkpoint.attempt == run.attempt)
    query = select(Checkpoint).where(*of_attempt, Checkpoint.step == step)
    return session.scalars(query).one_or_none()


def _insert_checkpoint(session: Session, run: Run, report: CheckpointReport) -> Checkpoint:
    values = {"run_id": run.id, "attempt": run.attempt, **report.model_dump()}
    row = Checkpoint(**values)
    session.add(row)
    session.flush()
    record_event(
        session,
        "run.checkpoint",
        study_id=run.study_id,
        run_id=run.id,
        attempt=run.attempt,
        step=report.step,
    )
    return row


def _supersede_oldest(session: Session, run: Run) -> tuple[str, ...]:
    """Mark the checkpoint after the newest two as superseded, unless it is final or a base.

    Returns its URI: the worker deletes its files.
    """
    newest = select(Checkpoint).where(Checkpoint.run_id == run.id)
    newest = newest.order_by(Checkpoint.attempt.desc(), Checkpoint.step.desc())
    # Locked until the commit: a target that starts from this checkpoint at the same time either
    # has written its name already, or finds the checkpoint superseded.
    oldest = newest.offset(_KEPT_CHECKPOINTS).limit(1).with_for_update()
    old = session.scalars(oldest).one_or_none()
    if old is None or old.final or _is_base(session, old):
        return ()
    old.superseded = True
    return (old.uri,)


def _is_base(session: Session, checkpoint: Checkpoint) -> bool:
    """Return whether a run grows from the checkpoint."""
    query = select(Run.id).where(Run.base_checkpoint_id == checkpoint.id).limit(1)
    return session.scalar(query) is not None
