"""The runs that go on from a trunk. The session comes first; nothing here commits.

A branch is enqueued by the publish of the checkpoint that it goes on from, in one transaction: at
no moment is the one there without the other, and the checkpoint is never given up.
"""

from collections.abc import Iterable
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from service.database.tables import Checkpoint, Run, Study
from service.events.audit_log import record_event
from service.problems import bad_field
from service.runs.store import new_run
from service.specs.stored import parse_stored
from service.studies.locks import lock
from warmcore.specs import CheckpointRef, RunSpec
from warmcore.specs.run import branch_of


def lock_study(session: Session, run_id: str, step: int) -> None:
    """Lock the study of a trunk that is about to branch at `step`.

    Taken before the run's lock, as everywhere: a cancel must not miss the run that this enqueues.
    """
    row = session.execute(select(Run.study_id, Run.spec).where(Run.id == run_id)).one_or_none()
    if row is not None and step in _steps(row.spec):
        lock(session, row.study_id)


def _steps(spec: dict[str, Any]) -> tuple[int, ...]:
    return RunSpec.model_validate(spec).branch_steps if spec.get("branches") else ()


def enqueue(session: Session, trunk: Run, checkpoint: Checkpoint) -> None:
    """Enqueue the run of the budget that cools down at this checkpoint, unless it is there."""
    steps = _steps(trunk.spec)
    if checkpoint.step not in steps:
        return
    number = steps.index(checkpoint.step) + 1
    if number in _started(session, trunk):
        return
    study = session.get_one(Study, trunk.study_id)
    run = _branch(study, trunk, checkpoint, number)
    session.add(run)
    session.flush()
    record_event(
        session,
        "run.queued",
        study_id=study.id,
        run_id=run.id,
        arm=run.arm,
        rung=run.rung,
        branch=number,
        trunk=trunk.id,
    )


def _branch(study: Study, trunk: Run, checkpoint: Checkpoint, number: int) -> Run:
    spec = RunSpec.model_validate(trunk.spec)
    ref = CheckpointRef(uri=checkpoint.uri, hash=checkpoint.hash)
    branch = branch_of(spec, spec.branches[number - 1], ref)
    run = new_run(study, parse_stored(study.spec), branch, trunk.params)
    run.kind, run.launch, run.rung, run.arm = "target", trunk.launch, trunk.rung, trunk.arm
    run.cpus, run.gpus, run.base_hash = trunk.cpus, trunk.gpus, trunk.base_hash
    run.base_checkpoint_id, run.trunk_id, run.branch = checkpoint.id, trunk.id, number
    run.step, run.tokens, run.trunk_tokens = checkpoint.step, checkpoint.tokens, checkpoint.tokens
    return run


def _started(session: Session, trunk: Run) -> frozenset[int]:
    return frozenset(session.scalars(select(Run.branch).where(Run.trunk_id == trunk.id)))


def check_all_started(session: Session, trunk: Run) -> None:
    """A trunk has succeeded when every budget has its run.

    Raises:
        Problem: 422 naming the steps whose checkpoints were not published.
    """
    started = _started(session, trunk)
    missing = [step for k, step in enumerate(_steps(trunk.spec), 1) if k not in started]
    if missing:
        raise bad_field("outcome", "succeeded", f"publish {_named(missing)} of this trunk first")


def _named(steps: Iterable[int]) -> str:
    return f"the checkpoints at steps {', '.join(map(str, steps))}"
