"""The OpenAPI document, made whole: every answer of each kind of call, and what leads to what.

FastAPI knows parameters, bodies and successes. What else can come back follows from what a call
has, so it is said in one table, and links follow from the names of parameters: a call that is
added later is described too. tests/service/test_openapi.py holds the live service to it.
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
    """One operation of the document."""

    path: str
    method: str
    operation: dict[str, Any]

    @property
    def parameters(self) -> list[dict[str, Any]]:
        """Of the path, the query and the headers."""
        return self.operation.get("parameters", [])

    @property
    def names(self) -> set[str]:
        """Of its parameters."""
        return {parameter["name"] for parameter in self.parameters}

    @property
    def has_body(self) -> bool:
        """Whether it is sent one."""
        return "requestBody" in self.operation

    @property
    def has_input(self) -> bool:
        """Whether anything that is sent can be wrong."""
        return self.has_body or bool(self.parameters)

    @property
    def needs_key(self) -> bool:
        """Whether it wants an API key."""
        return "security" in self.operation

    @property
    def has_subject(self) -> bool:
        """Whether its path names something that may not be there."""
        return "{" in self.path

    @property
    def changes(self) -> bool:
        """Whether it makes something, or moves what its path names to another state."""
        made = "201" in self.operation["responses"]
        return self.method != "get" and (self.has_subject or made)

    @property
    def needs_database(self) -> bool:
        """All but the probe of the process itself."""
        return self.path != "/healthz"


# status, when, what of a call brings it about
_PROBLEMS: tuple[tuple[int, str, Callable[[Call], bool]], ...] = (
    (400, "The body cannot be read as JSON.", lambda call: call.has_body),
    (401, "No API key, or one that is unknown, expired or revoked.", lambda call: call.needs_key),
    (403, "The key does not hold the scope.", lambda call: call.needs_key),
    (404, "There is nothing of this name.", lambda call: call.has_subject or call.needs_key),
    (
        409,
        "The request is good, the state is not; `type` says which.",
        lambda call: call.changes or "study" in call.names,
    ),
    (413, "The body is too large.", lambda call: call.has_body),
    (415, "The body is not `application/json`, or is compressed.", lambda call: call.has_body),
    (422, "Invalid: `errors` has the path of each bad field.", lambda call: call.has_input),
    (408, "The body did not arrive in time.", lambda call: call.has_body),
    (429, "Too many requests, or wrong keys; `Retry-After` says.", lambda call: call.needs_key),
    (500, "A fault of the service; its log has the trace.", lambda _: True),
    (503, "The database cannot be reached; try again.", lambda call: call.needs_database),
)

# An answer, and where in it a parameter of other calls is found.
_LEADS: tuple[tuple[str, str, str, dict[str, str]], ...] = (
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
    """Serve the whole document instead of FastAPI's."""
    plain = app.openapi

    def whole() -> dict[str, Any]:
        document = plain()  # which FastAPI keeps: describing it twice changes nothing
        complete_document(document)
        return document

    app.openapi = whole


def complete_document(document: dict[str, Any]) -> None:
    """Add every answer and every link that is not there yet."""
    calls = list(_calls(document))
    for call in calls:
        _add_problems(call)
    for call in calls:
        for target in calls:
            _add_link(call, target)
    for name in _FASTAPIS_OWN:
        document["components"]["schemas"].pop(name, None)


def _calls(document: dict[str, Any]) -> Iterator[Call]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield Call(path=path, method=method, operation=operation)


def _add_problems(call: Call) -> None:
    """Those of the table, and those that the route itself declares."""
    responses = call.operation["responses"]
    responses.pop("default", None)
    for status, description, happens in _PROBLEMS:
        if happens(call):
            responses.setdefault(str(status), {"description": description})
    for status, response in responses.items():
        if int(status) >= _FIRST_ERROR:
            response["content"] = _PROBLEM
        if int(status) in _HEADERS:
            response["headers"] = _HEADERS[int(status)]


def _add_link(call: Call, target: Call) -> None:
    """A link to a call that needs nothing but what this answer names."""
    for path, method, status, found in _LEADS:
        if (path, method) != (call.path, call.method):
            continue
        known = {name: where for name, where in found.items() if name in target.names}
        needed = {p["name"] for p in target.parameters if p.get("required")}
        if known and needed <= known.keys():
            name = target.operation["operationId"]
            links = call.operation["responses"][status].setdefault("links", {})
            links[name] = {"operationId": name, "parameters": known}


def may_answer(status: int, description: str) -> dict[int | str, dict[str, Any]]:
    """For a route's `responses`: a problem that calls of its kind do not have; see openapi.py."""
    return {status: {"description": description}}
