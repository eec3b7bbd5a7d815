"""Handlers that answer every error with a problem (RFC 9457)."""

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
# Python 3.13 renames the phrases of these statuses. Clients compare `type`: it must not change.
_KINDS = {413: "request-entity-too-large", 414: "request-uri-too-long"}
# SQLSTATE codes (https://www.postgresql.org/docs/current/errcodes-appendix.html).
_READ_ONLY = "25006"  # a standby refuses writes in the middle of a failover
_UNDEFINED = ("42P01", "42703")  # a table, a column: the database has another revision


class ProblemBody(BaseModel):
    """A problem (RFC 9457); `errors` lists the bad fields of a validation error."""

    type: str
    title: str
    status: int
    detail: str
    errors: list[FieldProblem] = []
    request_id: str | None = Field(
        default=None, description="the id of the log lines about this request"
    )


def _unread_body(works: str) -> Problem:
    """Make the 415 for a body in a format that the service does not read."""
    return Problem(415, "unsupported-media-type", f"the body was not read; {works}")


def _name_kind(status: HTTPStatus) -> str:
    """Return the phrase of a status as a problem's type, `method-not-allowed` for 405."""
    return status.phrase.lower().replace(" ", "-")


class ProblemResponse(JSONResponse):
    """A JSON response in ASCII.

    A problem quotes the client's value. That may hold half a surrogate pair: UTF-8 cannot encode
    it, and JSON can escape it.
    """

    media_type = MEDIA_TYPE

    def render(self, content: object) -> bytes:
        """Encode `content`, with every character outside ASCII escaped."""
        return json.dumps(content).encode()


def _make_response(problem: Problem, headers: dict[str, str] | None = None) -> JSONResponse:
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


def _make_field_problem(error: dict[str, Any], body: object) -> FieldProblem:
    """Convert an entry of pydantic's list; append the path of a `FieldError` of the whole spec."""
    raised = (error.get("ctx") or {}).get("error")
    path = ".".join(_user_path([part for part in error["loc"] if part != "body"], body))
    message, value = str(error["msg"]).removeprefix("Value error, "), error.get("input")
    if isinstance(raised, FieldError):
        path = ".".join(part for part in (path, raised.path) if part)
        message, value = str(raised), raised.value
    if error["type"] == "extra_forbidden":
        message = "unknown key; remove it or correct its spelling"
    return FieldProblem(path=path, message=message, value=_shorten(value))


def _user_path(parts: list[Any], body: object) -> Iterator[str]:
    """Yield the keys of a location as the user wrote them."""
    # pydantic adds the tag of a tagged union: ("search_space", "lr", "float", "low"). The body has
    # no key "float" there, it has `type: float`: leave the tag out.
    for part in parts:
        inside: dict[Any, Any] = body if isinstance(body, dict) else {}
        if part not in inside and part == inside.get("type"):
            continue
        yield str(part)
        body = _step_into(body, part)


def _step_into(body: object, part: object) -> object:
    if isinstance(body, dict):
        return body.get(part)
    if isinstance(body, list) and isinstance(part, int) and part < len(body):
        return body[part]
    return None


def _shorten(value: object) -> object:
    """Return a small value unchanged, and any other as the beginning of its text."""
    try:
        text = json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        text, value = repr(value), repr(value)
    return value if len(text) <= _LONGEST_VALUE else text[:_LONGEST_VALUE] + "…"


def validation_problem(errors: list[dict[str, Any]], body: object) -> Problem:
    """Make the 422 that lists every bad field; its detail quotes the first three."""
    fields = tuple(_make_field_problem(error, body) for error in errors)
    detail = "; ".join(f"{f.path}: {f.message} (got {f.value!r})" for f in fields[:3])
    return Problem(422, "invalid", detail, fields)


def _find_sqlstate(error: DBAPIError) -> str | None:
    return getattr(error.orig, "sqlstate", None)


def _classify(error: DBAPIError) -> Literal["away", "revision", "value", "bug"]:
    if isinstance(error, DataError):
        return "value"
    if error.connection_invalidated or _find_sqlstate(error) == _READ_ONLY:
        return "away"
    return "revision" if _find_sqlstate(error) in _UNDEFINED else "bug"


def _answer_revision(_: Request, error: Exception) -> JSONResponse:
    """Answer 503. Workers retry it, so that runs survive an upgrade in the wrong order."""
    _log.error("the database is of another revision", exc_info=error)
    detail = "the database is not at this version's revision; /readyz says more"
    return _make_response(Problem(503, "needs-upgrade", detail), {"Retry-After": "1"})


def _answer_value(_: Request, error: Exception) -> JSONResponse:
    reason = str(error.orig if isinstance(error, DataError) else error).splitlines()[0]
    return _make_response(Problem(422, "invalid", f"a value cannot be stored: {reason}"))


def install_handlers(app: FastAPI, *, away: tuple[type[Exception], ...]) -> None:
    """Answer every error of `app` with a problem.

    `away` are the errors of a database that is unreachable for a while: clients retry their 503.
    """

    @app.exception_handler(Problem)
    def answer_problem(_: Request, problem: Problem) -> JSONResponse:
        return _make_response(problem, problem.headers)

    @app.exception_handler(RequestValidationError)
    def answer_invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        # FastAPI leaves the body as bytes if its content type is not JSON.
        if isinstance(error.body, bytes):
            works = "send it as JSON, with `Content-Type: application/json`"
            return _make_response(_unread_body(works))
        return _make_response(validation_problem(list(error.errors()), error.body))

    @app.exception_handler(HTTPException)
    def answer_http(request: Request, error: HTTPException) -> JSONResponse:
        if error.status_code == HTTPStatus.BAD_REQUEST and "Content-Encoding" in request.headers:
            return _make_response(_unread_body("send it uncompressed, without `Content-Encoding`"))
        kind = _KINDS.get(error.status_code) or _name_kind(HTTPStatus(error.status_code))
        problem = Problem(error.status_code, kind, str(error.detail))
        return _make_response(problem, dict(error.headers or {}))

    @app.exception_handler(KeyTwiceError)
    def answer_twice(_: Request, error: KeyTwiceError) -> JSONResponse:
        message = "given twice in one object; give it once"
        return _make_response(bad_field(error.key, _shorten(error.values), message))

    app.add_exception_handler(Exception, _answer_bug)
    _install_database_handlers(app, away)


def _install_database_handlers(app: FastAPI, away: tuple[type[Exception], ...]) -> None:
    def answer_away(_: Request, error: Exception) -> JSONResponse:
        _log.warning("database unavailable", extra={"error": str(error).splitlines()[0]})
        problem = Problem(503, "database-unavailable", "the database cannot be reached; try again")
        return _make_response(problem, {"Retry-After": "1"})

    for kind in away:
        app.add_exception_handler(kind, answer_away)

    @app.exception_handler(DBAPIError)
    def answer_database(request: Request, error: DBAPIError) -> JSONResponse:
        answers = {
            "away": answer_away,
            "revision": _answer_revision,
            "value": _answer_value,
            "bug": _answer_bug,
        }
        return answers[_classify(error)](request, error)


def _answer_bug(request: Request, error: Exception) -> JSONResponse:
    _log.error("fault", extra={"path": request.url.path}, exc_info=error)
    facts = request_context.current_facts()
    headers = SAFE_HEADERS | ({REQUEST_ID_HEADER: facts.request_id} if facts else {})
    problem = Problem(500, "internal", "a fault of the service; its log has the trace")
    # Starlette calls this handler outside of all middleware: add the headers here.
    return _make_response(problem, headers)
