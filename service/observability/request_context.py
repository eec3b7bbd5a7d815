"""What the request at hand is about, for log lines, problems and events. Standard library only.

A request is a task with a context of its own. What is noted in it, in whatever thread of the
request, is in one object, so that the line written at its end has what was learned on the way.
"""

import re
import secrets
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

_SANE_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")


@dataclass(kw_only=True)
class RequestFacts:
    """Who asks for what."""

    request_id: str
    scope: Mapping[str, Any] = field(default_factory=dict[str, Any], repr=False)
    key_id: str | None = None
    study_id: str | None = None
    run_id: str | None = None
    attempt: int | None = None

    def fields(self) -> dict[str, Any]:
        """What is known so far, by the names that log lines use."""
        path: Mapping[str, str] = self.scope.get("path_params") or {}
        known = {
            "request": self.request_id,
            "key": self.key_id,
            "study": self.study_id or path.get("study"),
            "run": self.run_id or path.get("run_id"),
            "attempt": self.attempt,
        }
        return {name: value for name, value in known.items() if value is not None}


_acting: ContextVar[str | None] = ContextVar("acting", default=None)
_current: ContextVar[RequestFacts | None] = ContextVar("facts", default=None)


def begin_request(scope: Mapping[str, Any], given_id: str | None) -> RequestFacts:
    """The facts of a request that begins; its id is the one given, if that can stand in a log."""
    is_sane = given_id is not None and _SANE_ID.fullmatch(given_id)
    facts = RequestFacts(request_id=given_id if is_sane and given_id else secrets.token_hex(16))
    facts.scope = scope
    _current.set(facts)
    return facts


def current_facts() -> RequestFacts | None:
    """The facts of the request at hand; None outside of one."""
    return _current.get()


def note_facts(
    *,
    key_id: str | None = None,
    study_id: str | None = None,
    run_id: str | None = None,
    attempt: int | None = None,
) -> None:
    """Note what the request turned out to be about; nothing outside of one."""
    facts = _current.get()
    if facts is None:
        return
    facts.key_id = key_id or facts.key_id
    facts.study_id = study_id or facts.study_id
    facts.run_id = run_id or facts.run_id
    facts.attempt = attempt or facts.attempt


def current_actor() -> str:
    """Who does what is done now: the request's key; without a request, who has the database."""
    facts = _current.get()
    return _acting.get() or (facts.key_id if facts and facts.key_id else "operator")


@contextmanager
def act_as(name: str) -> Generator[None]:
    """What is done inside nobody asked for: it is `name`'s doing."""
    token = _acting.set(name)
    try:
        yield
    finally:
        _acting.reset(token)
