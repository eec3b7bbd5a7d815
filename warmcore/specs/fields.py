"""Types of fields, the base class of all specs, and errors that name a field (torch-free)."""

import functools
import hashlib
from collections.abc import Iterator
from typing import Annotated, Any, Self, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
OpenFraction = Annotated[float, Field(ge=0, lt=1)]
PositiveFraction = Annotated[float, Field(gt=0, le=1)]
InnerFraction = Annotated[float, Field(gt=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
# Bounds far beyond any model: every size that follows from them can still be computed and stored.
Width = Annotated[int, Field(gt=0, le=2**20)]
Depth = Annotated[int, Field(gt=0, le=10_000)]
VocabSize = Annotated[int, Field(gt=0, le=2**24)]
TokenCount = Annotated[int, Field(gt=0, le=10**15)]
TokensPerParam = Annotated[float, Field(gt=0, le=1e6)]
TokenIds = int | tuple[int, ...] | None


def derive_seed(*parts: object) -> int:
    """Return a seed in [0, 2^63) that is a function of all the parts and of nothing more."""
    # `hash()` would differ from process to process; SHA-256 gives the same seed on every machine.
    digest = hashlib.sha256(" ".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class Spec(BaseModel):
    """Base of all specs: frozen, keyword-only, strict about unknown keys and about booleans."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="wrap")
    @classmethod
    def _refuse_truth_for_numbers(
        cls, given: Any, validate: ModelWrapValidatorHandler[Self]
    ) -> Self:
        """Refuse true and false for numbers: YAML reads `on`, `yes` and `no` as true and false."""
        # Python's bool is a subclass of int, so pydantic would convert true to 1 without an error.
        if isinstance(given, dict):
            wrong = {
                name: v
                for name, v in given.items()
                if _contains_truth(v) and name in _find_number_fields(cls)
            }
            if wrong:
                raise _make_truth_error(cls, wrong)
        return validate(given)


def _contains_truth(value: object) -> bool:
    return isinstance(value, bool) or (isinstance(value, list | tuple) and bool in map(type, value))


@functools.cache
def _find_number_fields(spec: type[BaseModel]) -> frozenset[str]:
    """Return the names of fields that hold a number or a list of numbers, and never a boolean."""
    kinds = {name: set(_find_types(f.annotation)) for name, f in spec.model_fields.items()}
    return frozenset(name for name, k in kinds.items() if k & {int, float} and bool not in k)


def _find_types(annotation: Any) -> Iterator[Any]:
    # `tuple[float, ...] | None` yields the union itself, the tuple, float, `...` and NoneType.
    yield annotation
    for inner in get_args(annotation):
        yield from _find_types(inner)


def _make_truth_error(spec: type[BaseModel], wrong: dict[str, Any]) -> ValidationError:
    problem = PydanticCustomError("bool_for_number", "Input should be a number, not true or false")
    errors = [InitErrorDetails(type=problem, loc=(n,), input=v) for n, v in wrong.items()]
    return ValidationError.from_exception_data(spec.__name__, errors)


class FieldError(ValueError):
    """An invalid field, found by a check of a whole spec; `path` is relative to that spec."""

    def __init__(self, path: str, value: object, message: str) -> None:
        self.path = path
        self.value = value
        super().__init__(message)


def format_reason(error: ValueError) -> str:
    """Return the message of the first problem of a validation."""
    if isinstance(error, ValidationError):
        return error.errors()[0]["msg"].removeprefix("Value error, ")
    return str(error)
