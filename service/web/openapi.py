"""The OpenAPI document: FastAPI's, with the problems and the links of every call added.

FastAPI knows parameters, bodies and successes. The problems of a call follow from its parts, a body
or a path parameter for example, so a table lists them by part. Links follow from the names of
parameters. A route that is added later is described without further work.
tests/service/test_openapi.py compares the document with the answers of a running service.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI

from service.protocol import LEASE_TOKEN_HEADER
from service.web.error_handlers import MEDIA_TYPE

_PROBLEM = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/ProblemBody"}}}
_FIRST_ERROR = 400
_FASTAPIS_OWN = ("HTTPValidationError", "ValidationError")
_HEADERS: dict[int, dict[str, Any]] = {
    401: {"WWW-Authenticate": {"required": True, "schema": {"type": "string"}}},
    429: {"Retry-After": {"schema": {"type": "integer", "minimum": 0}}},
    503: {"Retry-After": {"schema": {"type": "integer", "minimum": 0}}},
}


@dataclass(frozen=True, kw_only=True)
class Call:
    """An operation of the document."""

    path: str
    method: str
    operation: dict[str, Any]

    @property
    def parameters(self) -> list[dict[str, Any]]:
        """The parameters in the path, the query and the headers."""
        return self.operation.get("parameters", [])

    @property
    def names(self) -> set[str]:
        """The names of the parameters."""
        return {parameter["name"] for parameter in self.parameters}

    @property
    def has_body(self) -> bool:
        """True if the request has a body."""
        return "requestBody" in self.operation

    @property
    def has_input(self) -> bool:
        """True if the request has a value that can be invalid."""
        return self.has_body or bool(self.parameters)

    @property
    def needs_key(self) -> bool:
        """True if the call requires an API key."""
        return "security" in self.operation

    @property
    def has_subject(self) -> bool:
        """True if the path names a study or a run: it may not exist."""
        return "{" in self.path

    @property
    def changes(self) -> bool:
        """True if the call creates an object, or changes the state of the object in its path."""
        made = "201" in self.operation["responses"]
        return self.method != "get" and (self.has_subject or made)

    @property
    def needs_database(self) -> bool:
        """True if the call reads the database: all but the probe of the process do."""
        return self.path != "/healthz"


# Status, description, and a condition: calls that meet it can answer with this problem. A status
# that a route declares itself (`may_answer`) keeps the route's description.
_PROBLEMS: tuple[tuple[int, str, Callable[[Call], bool]], ...] = (
    (400, "The body cannot be read as JSON.", lambda call: call.has_body),
    (401, "No API key, or one that is unknown, expired or revoked.", lambda call: call.needs_key),
    (403, "The key does not hold the scope.", lambda call: call.needs_key),
    (404, "Nothing has this name or id.", lambda call: call.has_subject or call.needs_key),
    (
        409,
        "The state does not allow this request; `type` names the reason.",
        lambda call: call.changes or "study" in call.names,
    ),
    (413, "The body is too large.", lambda call: call.has_body),
    (415, "The body is not `application/json`, or is compressed.", lambda call: call.has_body),
    (422, "Invalid: `errors` has the path of each bad field.", lambda call: call.has_input),
    (408, "The body did not arrive in time.", lambda call: call.has_body),
    (
        429,
        "Too many requests, or too many wrong keys; `Retry-After` has the seconds to wait.",
        lambda call: call.needs_key,
    ),
    (500, "A fault of the service; its log has the trace.", lambda _: True),
    (503, "The database cannot be reached; try again.", lambda call: call.needs_database),
)

# Path, method and status of an answer, and the places in it that hold parameters of other calls.
_LINK_SOURCES: tuple[tuple[str, str, str, dict[str, str]], ...] = (
    ("/v1/studies", "post", "201", {"study": "$response.body#/id"}),
    ("/v1/studies", "get", "200", {"study": "$response.body#/items/0/id"}),
    ("/v1/runs", "get", "200", {"run_id": "$response.body#/items/0/id"}),
    (
        "/v1/leases",
        "post",
        "200",
        {
            "run_id": "$response.body#/leases/0/run_id",
            LEASE_TOKEN_HEADER: "$response.body#/leases/0/lease_token",
        },
    ),
)


def install_document(app: FastAPI) -> None:
    """Serve the completed document in place of FastAPI's."""
    make_document = app.openapi

    def make_complete() -> dict[str, Any]:
        # FastAPI caches its document and returns it again. To complete it twice changes nothing.
        document = make_document()
        complete_document(document)
        return document

    app.openapi = make_complete


def complete_document(document: dict[str, Any]) -> None:
    """Add the problems and links that the document does not have yet."""
    calls = list(_list_calls(document))
    for call in calls:
        _add_problems(call)
    for call in calls:
        for target in calls:
            _add_link(call, target)
    for name in _FASTAPIS_OWN:
        document["components"]["schemas"].pop(name, None)


def _list_calls(document: dict[str, Any]) -> Iterator[Call]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield Call(path=path, method=method, operation=operation)


def _add_problems(call: Call) -> None:
    """Add the problems of the table, and complete those that the route declares."""
    responses = call.operation["responses"]
    responses.pop("default", None)  # `service.app` needs it for the component alone
    for status, description, happens in _PROBLEMS:
        if happens(call):
            responses.setdefault(str(status), {"description": description})
    for status, response in responses.items():
        if int(status) >= _FIRST_ERROR:
            response["content"] = _PROBLEM
        if int(status) in _HEADERS:
            response["headers"] = _HEADERS[int(status)]


def _add_link(call: Call, target: Call) -> None:
    """Add a link to `target` if this call's answer holds each parameter that it requires."""
    for path, method, status, places in _LINK_SOURCES:
        if (path, method) != (call.path, call.method):
            continue
        known = {name: place for name, place in places.items() if name in target.names}
        # A link may leave optional parameters open; the answer must hold each required parameter.
        needed = {p["name"] for p in target.parameters if p.get("required")}
        if known and needed <= known.keys():
            name = target.operation["operationId"]
            links = call.operation["responses"][status].setdefault("links", {})
            links[name] = {"operationId": name, "parameters": known}


def may_answer(status: int, description: str) -> dict[int | str, dict[str, Any]]:
    """Declare in a route's `responses` a problem that the table above does not give to the call."""
    return {status: {"description": description}}
