"""The states of studies and runs, and their transitions. Pure: no database, no clock."""

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

# Derived from the tables: a state without transitions is final.
FINAL_RUN_STATES = tuple(s for s in get_args(RunState) if not RUN_TRANSITIONS[s])
LIVE_RUN_STATES = tuple(s for s in get_args(RunState) if RUN_TRANSITIONS[s])
FINAL_STUDY_STATES = tuple(s for s in get_args(StudyState) if not STUDY_TRANSITIONS[s])

RETRY_FIRST_SECONDS = 1.0
RETRY_MAX_SECONDS = 300.0


def source_states(state: StudyState) -> tuple[StudyState, ...]:
    """Return the study states with a transition to `state`."""
    return tuple(s for s, nexts in STUDY_TRANSITIONS.items() if state in nexts)


def state_after_attempt(
    outcome: Outcome, *, retryable: bool, failures: int, max_attempts: int
) -> RunState:
    """Return the state of a leased run after its attempt has ended.

    `failures` counts the attempts that failed, with this attempt. A released run is queued at any
    count, because a user loses nothing when a fleet is drained.
    """
    match outcome:
        case "succeeded":
            return "succeeded"
        case "pruned":
            return "pruned"
        # The same seed would diverge again: a retry only wastes the steps.
        case "diverged":
            return "failed"
        case "released":
            return "queued"
        case "failed":
            return "queued" if retryable and failures < max_attempts else "failed"


def retry_delay_seconds(failures: int) -> float:
    """Return the pause before the next attempt: 1 s, doubled with each failure, at most 300 s."""
    return min(RETRY_FIRST_SECONDS * 2.0 ** max(0, failures - 1), RETRY_MAX_SECONDS)
