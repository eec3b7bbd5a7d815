"""Queries of the checkpoint collection. The session comes first; nothing here commits."""

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from service.database.tables import Checkpoint, Run
from service.events.audit_log import record_event
from service.operations.checkpoint_cleanup.policy import (
    CheckpointFact,
    Decision,
    decide_checkpoints,
)
from service.runs.store import find_best_growable
from service.studies.locks import lock_study

_DAY_SECONDS = 86400.0


def lock_and_decide(
    session: Session, study_id: str, older_than_days: float
) -> tuple[Decision, ...]:
    """Lock a study and its published checkpoints, and decide on each checkpoint."""
    # Two locks keep a target from starting at a checkpoint that is about to go. A target of this
    # study is enqueued under the study's lock. A target of another study names the checkpoint by
    # its URI and locks that row: read the targets (`_find_users`) after locking the rows, so that
    # a target that was enqueued meanwhile counts.
    study = lock_study(session, study_id)
    facts = _lock_facts(session, study_id)
    best = find_best_growable(session, study.id)
    return decide_checkpoints(
        facts,
        best_run=best.id if best else None,
        used_by=_find_users(session, facts),
        older_than_days=older_than_days,
    )


def _lock_facts(session: Session, study_id: str) -> tuple[CheckpointFact, ...]:
    age = func.extract("epoch", func.now() - Checkpoint.created_at) / _DAY_SECONDS
    query = (
        select(Checkpoint, Run.kind, Run.state, age)
        .join(Run, Run.id == Checkpoint.run_id)
        .where(Run.study_id == study_id, ~Checkpoint.superseded)
        .order_by(Checkpoint.id)
        .with_for_update(of=Checkpoint)
    )
    return tuple(
        CheckpointFact(
            id=row.id,
            run_id=row.run_id,
            uri=row.uri,
            hash=row.hash,
            num_bytes=row.num_bytes,
            final=row.final,
            age_days=float(days),
            kind="trial" if kind == "trial" else "target",
            state=state,  # pyright: ignore[reportArgumentType] - checked by the database
        )
        for row, kind, state, days in session.execute(query)
    )


def _find_users(session: Session, facts: tuple[CheckpointFact, ...]) -> dict[int, str]:
    """Return, for each checkpoint in use, the id of a run that starts from it.

    The run may be of any study. It names the checkpoint by its id, its URI or its hash.
    """
    named = {name: fact.id for fact in facts for name in (fact.uri, fact.hash)}
    base, trunk = Run.spec["growth"]["base"], Run.spec["trunk"]
    names = [ref[key].as_string() for ref in (base, trunk) for key in ("uri", "hash")]
    query = select(Run.id, Run.base_checkpoint_id, *names).where(Run.kind == "target")
    users: dict[int, str] = {}
    for run_id, checkpoint_id, *given in session.execute(query):
        for used_id in (checkpoint_id, *(named.get(name) for name in given)):
            if used_id is not None:
                users.setdefault(used_id, run_id)
    return users


def supersede_checkpoints(session: Session, study_id: str, decisions: tuple[Decision, ...]) -> None:
    """Supersede the checkpoints that are not kept: no run resumes or grows from them any more."""
    doomed = [decision.fact for decision in decisions if not decision.keep]
    for run_id in sorted({fact.run_id for fact in doomed}):
        ids = [fact.id for fact in doomed if fact.run_id == run_id]
        session.execute(update(Checkpoint).where(Checkpoint.id.in_(ids)).values(superseded=True))
        record_event(
            session, "run.checkpoints-dropped", study_id=study_id, run_id=run_id, checkpoints=ids
        )


def load_checkpoints(session: Session, study_id: str) -> list[tuple[Checkpoint, str]]:
    """Return every checkpoint of a study, superseded or not, with the state of its run."""
    query = select(Checkpoint, Run.state).join(Run, Run.id == Checkpoint.run_id)
    found = session.execute(query.where(Run.study_id == study_id).order_by(Checkpoint.id))
    return [(checkpoint, state) for checkpoint, state in found]


def load_run_states(session: Session, study_id: str) -> dict[str, str]:
    """Return the state of every run of a study."""
    query = select(Run.id, Run.state).where(Run.study_id == study_id)
    return {run_id: state for run_id, state in session.execute(query)}  # noqa: C416 - rows are no pairs to pyright
