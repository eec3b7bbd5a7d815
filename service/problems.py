"""Errors of the API as exceptions (RFC 9457 problems); no FastAPI."""

from typing import Any

from pydantic import BaseModel


class FieldProblem(BaseModel):
    """An invalid field: its path, the error with a value that would work, and the given value."""

    path: str
    message: str
    value: Any = None


class Problem(Exception):  # noqa: N818 - RFC 9457's word
    """An error that the API answers with.

    `kind` ends the problem's `type`, `not-found` for example. It is stable: clients compare it.
    `detail` is for people and names a request that would work.
    """

    def __init__(
        self,
        status: int,
        kind: str,
        detail: str,
        errors: tuple[FieldProblem, ...] = (),
        *,
        headers: dict[str, str] | None = None,
    ) -> None:
        self.status = status
        self.kind = kind
        self.detail = detail
        self.errors = errors
        self.headers = headers
        super().__init__(detail)


def not_found(noun: str, name: str) -> Problem:
    """Make the 404 for an object that does not exist, or that the caller cannot see."""
    return Problem(404, "not-found", f"there is no {noun} {name!r}")


def conflict(kind: str, detail: str) -> Problem:
    """Make the 409 for a valid request that the present state does not allow."""
    return Problem(409, kind, detail)


def bad_field(path: str, value: object, message: str) -> Problem:
    """Make the 422 for a single invalid field."""
    # The detail repeats the path: clients that show only the detail still name the field.
    field = FieldProblem(path=path, message=message, value=value)
    return Problem(422, "invalid", f"{path}: {message}", (field,))
