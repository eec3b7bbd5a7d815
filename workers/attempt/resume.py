"""Where an attempt goes on: the newest checkpoint that can be read.

One that is damaged or gone has the one before in its place. One that cannot be reached is not lost:
to start again for a store that was away for a minute would throw away what had been trained.
"""

import logging
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from warmcore.checkpoint.checkpoint import CheckpointCorruptError
from warmcore.specs import CheckpointRef
from warmcore.storage.backoff import Backoff, retry
from workers.attempt import checkpoints

T = TypeVar("T")

_BACKOFF = Backoff(first_seconds=0.5, max_seconds=10.0)
# The store answers, and says that nothing is there.
_GONE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)

log = logging.getLogger(__name__)


def read_newest(
    refs: Iterable[CheckpointRef],
    read: Callable[[Path], T],
    *,
    waits: Callable[[], object],
    patience_seconds: float,
) -> T | None:
    """What `read` makes of the first of `refs` that can be read; None where all are lost.

    `waits` is called before each wait, and may raise to end it.

    Raises:
        OSError: none can be read, and at least one may only be out of reach.
    """
    deadline, away = time.monotonic() + patience_seconds, None
    for ref in refs:
        try:
            return _read_patiently(ref, read, waits=waits, deadline=deadline)
        except (CheckpointCorruptError, *_GONE) as error:
            log.warning("checkpoint unusable", extra={"uri": ref.uri, "error": error})
        except OSError as error:
            log.warning("checkpoint out of reach", extra={"uri": ref.uri, "error": error})
            away = error
    if away is not None:
        raise away
    return None


def _read_patiently(
    ref: CheckpointRef, read: Callable[[Path], T], *, waits: Callable[[], object], deadline: float
) -> T:
    def read_once() -> T:
        with checkpoints.open_local(ref) as checkpoint:
            return read(checkpoint)

    return retry(
        read_once,
        _BACKOFF,
        on=OSError,
        deadline=deadline,
        is_worth_retrying=lambda error: not isinstance(error, _GONE),
        before_pause=lambda _: waits(),
    )
