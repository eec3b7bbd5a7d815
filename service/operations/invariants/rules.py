"""Rules: queries that return nothing in a correct database. Each row of a result is a violation."""

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
    """A broken invariant, with its study and run; `seen` describes the rows that break it."""

    invariant: Invariant
    study_id: str
    run_id: str | None
    seen: str


# For example the rule "a completed study has no live run" is
#     SELECT study_id, run_id, format('the study is %s, but this run is still %s', ...)
# The query joins the tables that `given` defines (a `WITH` clause that several rules share) and
# selects the study, the run or NULL, and a sentence for people.
@dataclass(frozen=True, kw_only=True)
class Rule:
    """A query that selects study_id, run_id and a sentence, with the shared tables of `given`.

    The results of an `at_rest` rule are only pending while requests are in flight: the next lease
    request repairs them. Once no request is in flight, the rule must find nothing.
    """

    invariant: Invariant
    given: str = ""
    query: str
    at_rest: bool = False

    def find_violations(self, session: Session) -> tuple[Violation, ...]:
        """Return the violations that the query finds."""
        query = self.given + self.query
        # A query names the lists of states that it needs (`:run_states`): bind only those.
        states = {name: _STATES[name] for name in _STATES if re.search(rf":{name}\b", query)}
        rows = session.execute(text(query), states)
        return tuple(
            Violation(invariant=self.invariant, study_id=study_id, run_id=run_id, seen=seen)
            for study_id, run_id, seen in rows
        )


# The allowed transitions as pairs, with "" for the state before the first event. For example
# ("", "queued") and ("leased", "succeeded"). A study's first event is `created`, its state active.
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
