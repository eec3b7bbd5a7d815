"""The state tables, and what follows from them. Pure: no database, no clock."""

from typing import get_args

from service.protocol import Outcome, RunState, StudyState

STUDY_TRANSITIONS: dict[StudyState, frozenset[StudyState]] = {
    "active": frozenset({"paused", "completed", "cancelled", "failed"}),
    "paused": frozenset({"active", "completed", "cancelled", "failed"}),
    "completed": frozenset(),
    "cancelled": frozenset(),
    "failed": frozenset(),
}

RUN_TRANSITIONS: dict[RunState, frozenset[RunState]] = {
    "queued": frozenset({"leased", "cancelled"}),
    "leased": frozenset({"queued", "succeeded", "pruned", "failed", "cancelled"}),
    "succeeded": frozenset(),
    "pruned": frozenset(),
    "failed": frozenset(),
    "cancelled": frozenset(),
}

FINAL_RUN_STATES = tuple(s for s in get_args(RunState) if not RUN_TRANSITIONS[s])
LIVE_RUN_STATES = tuple(s for s in get_args(RunState) if RUN_TRANSITIONS[s])
FINAL_STUDY_STATES = tuple(s for s in get_args(StudyState) if not STUDY_TRANSITIONS[s])

RETRY_FIRST_SECONDS = 1.0
RETRY_MAX_SECONDS = 300.0


def source_states(state: StudyState) -> tuple[StudyState, ...]:
    """The study states from which `state` can be reached."""
    return tuple(s for s, nexts in STUDY_TRANSITIONS.items() if state in nexts)


def state_after_attempt(
    outcome: Outcome, *, retryable: bool, failures: int, max_attempts: int
) -> RunState:
    """Where a leased run goes when its attempt ends.

    `failures` counts the attempts that ended badly, this one included. A run that was given back
    unharmed is queued whatever they are: draining a fleet costs a user nothing.
    """
    match outcome:
        case "succeeded":
            return "succeeded"
        case "pruned":
            return "pruned"
        case "diverged":
            return "failed"
        case "released":
            return "queued"
        case "failed":
            return "queued" if retryable and failures < max_attempts else "failed"


def retry_delay_seconds(failures: int) -> float:
    """Exponential: 1 s after the first failure, doubling, 5 minutes at most."""
    return min(RETRY_FIRST_SECONDS * 2.0 ** max(0, failures - 1), RETRY_MAX_SECONDS)
