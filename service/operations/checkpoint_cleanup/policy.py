"""Which checkpoints are kept, and why. Pure: no database, no clock, no files."""

from collections.abc import Iterable
from dataclasses import dataclass

from service.lifecycle import LIVE_RUN_STATES
from service.protocol import RunKind, RunState


@dataclass(frozen=True, kw_only=True)
class CheckpointFact:
    """A published checkpoint, and the run that made it."""

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
    """What becomes of a checkpoint; `reason` says why it is kept, or what it was."""

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
    """Decide on a study's checkpoints, of which `used_by` names a run that starts from one.

    Kept are: all of a run that may go on, so that it can fall back from one that is corrupt; what
    any run started from; the final one of the best trial and of every target; what is younger.
    """
    decisions: list[Decision] = []
    for fact in facts:
        reason = _kept_because(fact, best_run, used_by, older_than_days)
        decisions.append(Decision(fact=fact, keep=reason is not None, reason=reason or _was(fact)))
    return tuple(decisions)


def _kept_because(
    fact: CheckpointFact, best_run: str | None, used_by: dict[int, str], older_than_days: float
) -> str | None:
    if fact.state in LIVE_RUN_STATES:
        return f"its run is {fact.state} and resumes from it"
    if fact.id in used_by:
        return f"{used_by[fact.id]} starts from it"
    if fact.final and fact.run_id == best_run:
        return "the final one of the best trial"
    if fact.final and fact.kind == "target" and fact.state == "succeeded":
        return "the final one of a target"
    if fact.age_days < older_than_days:
        return f"younger than {older_than_days:g} days"
    return None


def _was(fact: CheckpointFact) -> str:
    which = "the final one" if fact.final else "one on the way"
    return f"{which} of a {fact.kind} that is {fact.state}"
