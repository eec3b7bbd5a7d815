"""Specs as they are stored, read back."""

import json
import logging
from functools import lru_cache
from typing import Any

from pydantic import ValidationError

from service.problems import Problem
from service.specs.study import StudySpec

_KEPT = 256
_log = logging.getLogger(__name__)


class UnreadableSpecError(Problem):
    """A stored spec that another version of the service wrote, and only that can read.

    While an installation is upgraded the next replica may read it: what has to is tried again, and
    the study is left as it is.
    """

    def __init__(self, reason: str) -> None:
        detail = f"this version of the service cannot read the study's spec ({reason}); try again"
        super().__init__(503, "needs-upgrade", detail, headers={"Retry-After": "1"})


def parse_stored(stored: dict[str, Any]) -> StudySpec:
    """The spec of a stored study; checked once, since every request of a study reads it again.

    Raises:
        UnreadableSpecError: 503, it is of another version.
    """
    try:
        return _parse_text(json.dumps(stored))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UnreadableSpecError(f"{where}: {first['msg']}") from error


@lru_cache(maxsize=_KEPT)
def _parse_text(text: str) -> StudySpec:
    return StudySpec.model_validate_json(text)


@lru_cache(maxsize=_KEPT)
def log_skipped_study(study_id: str, reason: str) -> None:
    """Say once that a study is left to a replica of another version."""
    _log.warning("a study is left to another version", extra={"study": study_id, "error": reason})
