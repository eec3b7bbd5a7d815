"""Specs as they are stored, read back."""

import json
from functools import lru_cache
from typing import Any

from service.studies.study_spec import StudySpec

_KEPT = 256


def parsed(stored: dict[str, Any]) -> StudySpec:
    """The spec of a stored study; checked once, since every request of a study reads it again."""
    return _parsed(json.dumps(stored))


@lru_cache(maxsize=_KEPT)
def _parsed(text: str) -> StudySpec:
    return StudySpec.model_validate_json(text)
