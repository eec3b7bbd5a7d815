"""Facts about the current request, for log lines, problems and events. Standard library only.

A request is a task with a context of its own. All its threads add facts to the same object. The
log line at the request's end therefore has every fact that was found on the way.
"""

import re
import secrets
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

# The id is echoed in a header and written to the log: it must not break either.
_SAFE_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")


@dataclass(kw_only=True)
class RequestFacts:
    """The facts of a request: its key, and the study, run and attempt that it is about."""

    request_id: str
    scope: Mapping[str, Any] = field(default_factory=dict[str, Any], repr=False)
    key_id: str | None = None
    study_id: str | None = None
    run_id: str | None = None
    attempt: int | None = None

    def fields(self) -> dict[str, Any]:
        """Return the facts known until now, under the names that log lines use."""
        # Routes do not note their path parameters: Starlette adds them to the scope when it routes.
        path: Mapping[str, str] = self.scope.get("path_params") or {}
        known = {
            "request": self.request_id,
            "key": self.key_id,
            "study": self.study_id or path.get("study"),
            "run": self.run_id or path.get("run_id"),
            "attempt": self.attempt,
        }
        return {name: value for name, value in known.items() if value is not None}


# `_acting` overrides the caller as actor, see `act_as`. Both are copied into the request's threads.
_acting: ContextVar[str | None] = ContextVar("acting", default=None)
_current: ContextVar[RequestFacts | None] = ContextVar("facts", default=None)


def begin_request(scope: Mapping[str, Any], given_id: str | None) -> RequestFacts:
    """Make the facts of a new request; it keeps the id that the client gave if that is safe."""
    is_safe = given_id is not None and _SAFE_ID.fullmatch(given_id)
    facts = RequestFacts(request_id=given_id if is_safe and given_id else secrets.token_hex(16))
    facts.scope = scope
    _current.set(facts)
    return facts


def current_facts() -> RequestFacts | None:
    """Return the facts of the current request; None outside of a request."""
    return _current.get()


def note_facts(
    *,
    key_id: str | None = None,
    study_id: str | None = None,
    run_id: str | None = None,
    attempt: int | None = None,
) -> None:
    """Add facts to the current request; outside of a request, do nothing."""
    facts = _current.get()
    if facts is None:
        return
    facts.key_id = key_id or facts.key_id
    facts.study_id = study_id or facts.study_id
    facts.run_id = run_id or facts.run_id
    facts.attempt = attempt or facts.attempt


def current_actor() -> str:
    """Return the actor of events written now: the request's key, or `operator` without a request.

    An operator works on the database itself, with `warmscale key create` for example.
    """
    facts = _current.get()
    return _acting.get() or (facts.key_id if facts and facts.key_id else "operator")


@contextmanager
def act_as(name: str) -> Generator[None]:
    """Make `name` the actor of the events that the block writes, in place of the caller."""
    token = _acting.set(name)
    try:
        yield
    finally:
        _acting.reset(token)
