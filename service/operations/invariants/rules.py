"""A rule is a query that finds nothing: each row that it gives is a violation."""

import re
from dataclasses import dataclass
from typing import Literal

from sqlalchemy import text
from sqlalchemy.orm import Session

from service.lifecycle import FINAL_RUN_STATES, RUN_TRANSITIONS, STUDY_TRANSITIONS

Invariant = Literal[
    "finished-runs-stand",
    "trials-count-once",
    "one-lease",
    "no-stale-write",
    "curves-whole",
    "optuna-agrees",
    "files-whole",
    "lifecycle-kept",
    "specs-read",
]


@dataclass(frozen=True, kw_only=True)
class Violation:
    """What should never be seen: which invariant, of which study and run, and what was seen."""

    invariant: Invariant
    study_id: str
    run_id: str | None
    seen: str


@dataclass(frozen=True, kw_only=True)
class Rule:
    """`query`, after the tables of `given`, gives study_id, run_id and what was `seen`.

    What an `at_rest` rule finds is only pending while requests are on their way: the next lease
    request mends it. With nothing left to do it must find nothing either.
    """

    invariant: Invariant
    given: str = ""
    query: str
    at_rest: bool = False

    def violations(self, session: Session) -> tuple[Violation, ...]:
        """What the query finds, now."""
        query = self.given + self.query
        states = {name: _STATES[name] for name in _STATES if re.search(rf":{name}\b", query)}
        rows = session.execute(text(query), states)
        return tuple(
            Violation(invariant=self.invariant, study_id=study_id, run_id=run_id, seen=seen)
            for study_id, run_id, seen in rows
        )


# "" is before the first event; a study is created active.
_RUN = [("", "queued"), *((a, b) for a, nexts in RUN_TRANSITIONS.items() for b in nexts)]
_STUDY = [("", "created"), *((a, b) for a, nexts in STUDY_TRANSITIONS.items() for b in nexts)]

_STATES: dict[str, list[str]] = {
    "run_states": list(RUN_TRANSITIONS),
    "final_run_states": list(FINAL_RUN_STATES),
    "run_from": [a for a, _ in _RUN],
    "run_to": [b for _, b in _RUN],
    "study_states": ["created", *STUDY_TRANSITIONS],
    "study_from": [a for a, _ in _STUDY],
    "study_to": [b for _, b in _STUDY],
}
