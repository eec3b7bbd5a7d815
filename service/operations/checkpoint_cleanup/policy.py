"""The choice of the checkpoints to keep, with reasons. Pure: no database, no clock, no files."""

from collections.abc import Iterable
from dataclasses import dataclass

from service.lifecycle import LIVE_RUN_STATES
from service.protocol import RunKind, RunState


@dataclass(frozen=True, kw_only=True)
class CheckpointFact:
    """A published checkpoint with the kind and state of its run."""

    id: int
    run_id: str
    uri: str
    hash: str
    num_bytes: int
    final: bool
    age_days: float
    kind: RunKind
    state: RunState


@dataclass(frozen=True, kw_only=True)
class Decision:
    """The decision on a checkpoint; `reason` names the need to keep it, or describes it."""

    fact: CheckpointFact
    keep: bool
    reason: str


def decide_checkpoints(
    facts: Iterable[CheckpointFact],
    *,
    best_run: str | None,
    used_by: dict[int, str],
    older_than_days: float,
) -> tuple[Decision, ...]:
    """Decide on a study's checkpoints; `used_by` names a run that starts from a checkpoint.

    Keep every checkpoint of a live run: if the newest is damaged, the run resumes from an older
    checkpoint. Keep every checkpoint that a run started from, the final checkpoints of the best
    trial and of each target, and every checkpoint younger than the limit.
    """
    decisions: list[Decision] = []
    for fact in facts:
        need = _find_need(fact, best_run, used_by, older_than_days)
        reason = need or _describe_checkpoint(fact)
        decisions.append(Decision(fact=fact, keep=need is not None, reason=reason))
    return tuple(decisions)


def _find_need(
    fact: CheckpointFact, best_run: str | None, used_by: dict[int, str], older_than_days: float
) -> str | None:
    if fact.state in LIVE_RUN_STATES:
        return f"its run is {fact.state} and may resume from it"
    if fact.id in used_by:
        return f"{used_by[fact.id]} starts from it"
    # A user may start another target from the best trial at any time, and export a target's model.
    if fact.final and fact.run_id == best_run:
        return "final checkpoint of the best trial"
    if fact.final and fact.kind == "target" and fact.state == "succeeded":
        return "final checkpoint of a target"
    if fact.age_days < older_than_days:
        return f"younger than {older_than_days:g} days"
    return None


def _describe_checkpoint(fact: CheckpointFact) -> str:
    position = "final" if fact.final else "intermediate"
    return f"{position} checkpoint of a {fact.kind} that is {fact.state}"
