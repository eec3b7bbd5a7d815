"""Branches of a trunk: the runs that cool down from its checkpoints. Nothing here commits.

Publishing the checkpoint of a branch point enqueues the branch in the same transaction. Neither
exists without the other, and the branch's reference keeps the checkpoint from being superseded.
"""

from collections.abc import Iterable
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from service.database.tables import Checkpoint, Run, Study
from service.events.audit_log import record_event
from service.problems import bad_field
from service.runs.store import make_run
from service.specs.stored import parse_stored
from service.studies.locks import lock_study
from warmcore.specs import CheckpointRef, RunSpec
from warmcore.specs.run import make_branch


def lock_branching_study(session: Session, run_id: str, step: int) -> None:
    """Lock the study of a trunk that branches at `step`; do nothing for other runs and steps.

    The study's lock comes before the run's, as everywhere. A cancel of the study waits for it and
    then sees the branch that this transaction enqueues.
    """
    row = session.execute(select(Run.study_id, Run.spec).where(Run.id == run_id)).one_or_none()
    if row is not None and step in _branch_steps(row.spec):
        lock_study(session, row.study_id)


def _branch_steps(spec: dict[str, Any]) -> tuple[int, ...]:
    return RunSpec.model_validate(spec).branch_steps if spec.get("branches") else ()


def enqueue_branch(session: Session, trunk: Run, checkpoint: Checkpoint) -> None:
    """Enqueue the run of the budget that cools down at this checkpoint, unless it exists."""
    # Example: a trunk of budgets 2 and 4 tokens per parameter, 400 and 800 steps long, with a
    # cooldown of 20 %. Its branch points are steps 320 and 640. The checkpoint of step 320 enqueues
    # branch 1, which trains steps 320 to 400; the checkpoint of step 640 enqueues branch 2. A
    # second attempt of the trunk that publishes step 320 again enqueues nothing.
    steps = _branch_steps(trunk.spec)
    if checkpoint.step not in steps:
        return
    number = steps.index(checkpoint.step) + 1
    if number in _find_enqueued(session, trunk):
        return
    study = session.get_one(Study, trunk.study_id)
    run = _make_branch(study, trunk, checkpoint, number)
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


def _make_branch(study: Study, trunk: Run, checkpoint: Checkpoint, number: int) -> Run:
    spec = RunSpec.model_validate(trunk.spec)
    ref = CheckpointRef(uri=checkpoint.uri, hash=checkpoint.hash)
    branch = make_branch(spec, spec.branches[number - 1], ref)
    run = make_run(study, parse_stored(study.spec), branch, trunk.params)
    # The branch shows the trunk's progress; its cost counts the steps after `trunk_tokens` alone.
    run.kind, run.launch, run.rung, run.arm = "target", trunk.launch, trunk.rung, trunk.arm
    run.cpus, run.gpus, run.base_hash = trunk.cpus, trunk.gpus, trunk.base_hash
    run.base_checkpoint_id, run.trunk_id, run.branch = checkpoint.id, trunk.id, number
    run.step, run.tokens, run.trunk_tokens = checkpoint.step, checkpoint.tokens, checkpoint.tokens
    return run


def _find_enqueued(session: Session, trunk: Run) -> frozenset[int]:
    return frozenset(session.scalars(select(Run.branch).where(Run.trunk_id == trunk.id)))


def check_all_started(session: Session, trunk: Run) -> None:
    """Check that every budget of a trunk has its run: without them it has not succeeded.

    Raises:
        Problem: 422 naming the steps whose checkpoints were not published.
    """
    enqueued = _find_enqueued(session, trunk)
    missing = [step for k, step in enumerate(_branch_steps(trunk.spec), 1) if k not in enqueued]
    if missing:
        steps = _format_checkpoints(missing)
        raise bad_field("outcome", "succeeded", f"publish {steps} of this trunk first")


def _format_checkpoints(steps: Iterable[int]) -> str:
    return f"the checkpoints at steps {', '.join(map(str, steps))}"
