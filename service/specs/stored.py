"""Study specs read back from the database."""

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
    """A stored spec that only another version of the service can read.

    While an installation is upgraded, a replica of that version can read it. The caller retries,
    and the study stays as it is.
    """

    def __init__(self, reason: str) -> None:
        detail = f"this version of the service cannot read the study's spec ({reason}); try again"
        super().__init__(503, "needs-upgrade", detail, headers={"Retry-After": "1"})


def parse_stored(stored: dict[str, Any]) -> StudySpec:
    """Return the spec of a stored study; equal specs are parsed once and cached.

    Raises:
        UnreadableSpecError: 503, another version wrote the spec.
    """
    # Every request about a study reads its spec, and a parse takes milliseconds. The text is the
    # key of the cache: a spec never changes, and a study that is written again has another text.
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
    """Log once for each study and reason that it is left to a replica of another version."""
    _log.warning("a study is left to another version", extra={"study": study_id, "error": reason})
