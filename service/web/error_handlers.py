"""Problems (RFC 9457) and how every error becomes one."""

import json
import logging
from collections.abc import Iterator
from http import HTTPStatus
from typing import Any, Literal

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from sqlalchemy.exc import DataError, DBAPIError
from starlette.exceptions import HTTPException

from service.observability import metrics, request_context
from service.problems import FieldProblem, Problem, bad_field
from service.protocol import REQUEST_ID_HEADER
from service.web.json_body import KeyTwiceError
from service.web.protection import SAFE_HEADERS
from warmcore.specs.fields import FieldError

_log = logging.getLogger(__name__)
MEDIA_TYPE = "application/problem+json"
_LONGEST_VALUE = 200
# Python 3.13 has other words for these; a type stays what it is.
_KINDS = {413: "request-entity-too-large", 414: "request-uri-too-long"}
_READ_ONLY = "25006"  # a standby, in the middle of a failover
_UNDEFINED = ("42P01", "42703")  # a table, a column


class ProblemBody(BaseModel):
    """RFC 9457, with the bad fields of a validation error."""

    type: str
    title: str
    status: int
    detail: str
    errors: list[FieldProblem] = []
    request_id: str | None = Field(default=None, description="find it in the log")


def _unread(works: str) -> Problem:
    """415 for a body that is not looked into."""
    return Problem(415, "unsupported-media-type", f"the body was not read; {works}")


def _words(status: HTTPStatus) -> str:
    return status.phrase.lower().replace(" ", "-")


class ProblemResponse(JSONResponse):
    """In ASCII: what was given is sent back, and it may hold half a surrogate pair."""

    media_type = MEDIA_TYPE

    def render(self, content: object) -> bytes:
        """Escape everything that is not ASCII."""
        return json.dumps(content).encode()


def _response(problem: Problem, headers: dict[str, str] | None = None) -> JSONResponse:
    metrics.count_problem(problem.kind)
    facts = request_context.current_facts()
    body = ProblemBody(
        type=f"urn:warmscale:{problem.kind}",
        title=HTTPStatus(problem.status).phrase,
        status=problem.status,
        detail=problem.detail,
        errors=list(problem.errors),
        request_id=facts.request_id if facts else None,
    )
    return ProblemResponse(body.model_dump(), problem.status, headers=headers)


def _field(error: dict[str, Any], body: object) -> FieldProblem:
    """One entry of pydantic's list; a FieldError raised by a whole spec names its own path."""
    raised = (error.get("ctx") or {}).get("error")
    path = ".".join(_path([part for part in error["loc"] if part != "body"], body))
    message, value = str(error["msg"]).removeprefix("Value error, "), error.get("input")
    if isinstance(raised, FieldError):
        path = ".".join(part for part in (path, raised.path) if part)
        message, value = str(raised), raised.value
    if error["type"] == "extra_forbidden":
        message = "unknown key; remove it or correct its spelling"
    return FieldProblem(path=path, message=message, value=_short(value))


def _path(parts: list[Any], body: object) -> Iterator[str]:
    """The location as a user wrote it: without the tag that pydantic adds below a tagged union."""
    for part in parts:
        inside: dict[Any, Any] = body if isinstance(body, dict) else {}
        if part not in inside and part == inside.get("type"):
            continue
        yield str(part)
        body = _inside(body, part)


def _inside(body: object, part: object) -> object:
    if isinstance(body, dict):
        return body.get(part)
    if isinstance(body, list) and isinstance(part, int) and part < len(body):
        return body[part]
    return None


def _short(value: object) -> object:
    """What was given, if it is small and can be sent back; else the beginning of its text."""
    try:
        text = json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        text, value = repr(value), repr(value)
    return value if len(text) <= _LONGEST_VALUE else text[:_LONGEST_VALUE] + "…"


def validation_problem(errors: list[dict[str, Any]], body: object) -> Problem:
    """422 with every bad field."""
    fields = tuple(_field(error, body) for error in errors)
    detail = "; ".join(f"{f.path}: {f.message} (got {f.value!r})" for f in fields[:3])
    return Problem(422, "invalid", detail, fields)


def _sqlstate(error: DBAPIError) -> str | None:
    return getattr(error.orig, "sqlstate", None)


def _fault(error: DBAPIError) -> Literal["away", "revision", "value", "bug"]:
    if isinstance(error, DataError):
        return "value"
    if error.connection_invalidated or _sqlstate(error) == _READ_ONLY:
        return "away"
    return "revision" if _sqlstate(error) in _UNDEFINED else "bug"


def _on_revision(_: Request, error: Exception) -> JSONResponse:
    """503: a worker tries again, and its run outlives an upgrade in the wrong order."""
    _log.error("the database is of another revision", exc_info=error)
    detail = "the database is not at this version's revision; /readyz says more"
    return _response(Problem(503, "needs-upgrade", detail), {"Retry-After": "1"})


def _on_value(_: Request, error: Exception) -> JSONResponse:
    reason = str(error.orig if isinstance(error, DataError) else error).splitlines()[0]
    return _response(Problem(422, "invalid", f"a value cannot be stored: {reason}"))


def install_handlers(app: FastAPI, *, away: tuple[type[Exception], ...]) -> None:
    """Answer every error of `app` as a problem; those in `away` pass by themselves."""

    @app.exception_handler(Problem)
    def on_problem(_: Request, problem: Problem) -> JSONResponse:
        return _response(problem, problem.headers)

    @app.exception_handler(RequestValidationError)
    def on_invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        if isinstance(error.body, bytes):  # FastAPI reads JSON, and what says that it is JSON
            return _response(_unread("send it as JSON, with `Content-Type: application/json`"))
        return _response(validation_problem(list(error.errors()), error.body))

    @app.exception_handler(HTTPException)
    def on_http(request: Request, error: HTTPException) -> JSONResponse:
        if error.status_code == HTTPStatus.BAD_REQUEST and "Content-Encoding" in request.headers:
            return _response(_unread("send it uncompressed, without `Content-Encoding`"))
        kind = _KINDS.get(error.status_code) or _words(HTTPStatus(error.status_code))
        return _response(
            Problem(error.status_code, kind, str(error.detail)), dict(error.headers or {})
        )

    @app.exception_handler(KeyTwiceError)
    def on_twice(_: Request, error: KeyTwiceError) -> JSONResponse:
        message = "given twice in one object; give it once"
        return _response(bad_field(error.key, _short(error.values), message))

    app.add_exception_handler(Exception, _on_bug)
    _install_database(app, away)


def _install_database(app: FastAPI, away: tuple[type[Exception], ...]) -> None:
    def on_away(_: Request, error: Exception) -> JSONResponse:
        _log.warning("database unavailable", extra={"error": str(error).splitlines()[0]})
        problem = Problem(503, "database-unavailable", "the database cannot be reached; try again")
        return _response(problem, {"Retry-After": "1"})

    for kind in away:
        app.add_exception_handler(kind, on_away)

    @app.exception_handler(DBAPIError)
    def on_database(request: Request, error: DBAPIError) -> JSONResponse:
        answers = {"away": on_away, "revision": _on_revision, "value": _on_value, "bug": _on_bug}
        return answers[_fault(error)](request, error)


def _on_bug(request: Request, error: Exception) -> JSONResponse:
    _log.error("fault", extra={"path": request.url.path}, exc_info=error)
    facts = request_context.current_facts()
    headers = SAFE_HEADERS | ({REQUEST_ID_HEADER: facts.request_id} if facts else {})
    problem = Problem(500, "internal", "a fault of the service; its log has the trace")
    return _response(problem, headers)  # out here no middleware adds the header
