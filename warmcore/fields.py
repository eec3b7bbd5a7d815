"""Kinds of numbers that the specs have, with bounds far beyond any model (torch-free)."""

import hashlib
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
OpenFraction = Annotated[float, Field(ge=0, lt=1)]
PositiveFraction = Annotated[float, Field(gt=0, le=1)]
InnerFraction = Annotated[float, Field(gt=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
# Bounds far beyond any model, so that every size that follows from them can be computed and stored.
Width = Annotated[int, Field(gt=0, le=2**20)]
Depth = Annotated[int, Field(gt=0, le=10_000)]
VocabSize = Annotated[int, Field(gt=0, le=2**24)]
TokenCount = Annotated[int, Field(gt=0, le=10**15)]
TokensPerParam = Annotated[float, Field(gt=0, le=1e6)]


def derived_seed(*parts: object) -> int:
    """A seed in [0, 2^63) that depends on every part and on nothing else."""
    digest = hashlib.sha256(" ".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class Spec(BaseModel):
    """Frozen, keyword-only, and strict about unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
