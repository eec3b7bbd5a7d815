"""Errors of the API (RFC 9457 problems), as exceptions; no FastAPI."""

from typing import Any

from pydantic import BaseModel


class FieldProblem(BaseModel):
    """One bad field: where, what is wrong and what would work, what was given."""

    path: str
    message: str
    value: Any = None


class Problem(Exception):  # noqa: N818 - RFC 9457's word
    """An error to answer with. `type` is stable; `detail` says what would work."""

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


def not_found(what: str, key: str) -> Problem:
    """404 for a `what` that does not exist (or that this key may not see)."""
    return Problem(404, "not-found", f"there is no {what} {key!r}")


def conflict(kind: str, detail: str) -> Problem:
    """409: the request is good, the state is not."""
    return Problem(409, kind, detail)


def bad_field(path: str, value: object, message: str) -> Problem:
    """422 for one field."""
    field = FieldProblem(path=path, message=message, value=value)
    return Problem(422, "invalid", f"{path}: {message}", (field,))
