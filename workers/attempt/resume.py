"""The resume protocol: an attempt goes on from the newest checkpoint that can be read.

A damaged or missing checkpoint is replaced by the checkpoint before it. A store that cannot be
reached is waited for: starting again after an outage of a minute would lose hours of training.
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
# The store answered that the file does not exist. Another OSError may be an outage.
_GONE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)

log = logging.getLogger(__name__)


def read_newest(
    refs: Iterable[CheckpointRef],
    read: Callable[[Path], T],
    *,
    before_wait: Callable[[], object],
    patience_seconds: float,
) -> T | None:
    """Return the result of `read` for the first readable checkpoint; None when all are lost.

    Args:
        refs: Checkpoints of the run, newest first.
        read: Reads a checkpoint from a local folder.
        before_wait: Called before each wait; it may raise to end the wait.
        patience_seconds: Longest total wait for the store.

    Raises:
        OSError: no checkpoint can be read, and at least one may only be out of reach.
    """
    # Example with checkpoints at steps 300, 200, 100. Step 300 has a wrong hash: go on at 200. If
    # step 200 then times out until the patience ends, go on at 100 after all. If 100 is out of
    # reach too, raise: step 200 may exist, and the service will start another attempt.
    deadline, unreachable = time.monotonic() + patience_seconds, None
    for ref in refs:
        try:
            return _read_patiently(ref, read, before_wait=before_wait, deadline=deadline)
        except (CheckpointCorruptError, *_GONE) as error:
            log.warning("checkpoint unusable", extra={"uri": ref.uri, "error": error})
        except OSError as error:
            log.warning("checkpoint out of reach", extra={"uri": ref.uri, "error": error})
            unreachable = error
    if unreachable is not None:
        raise unreachable
    return None


def _read_patiently(
    ref: CheckpointRef,
    read: Callable[[Path], T],
    *,
    before_wait: Callable[[], object],
    deadline: float,
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
        before_pause=lambda _: before_wait(),
    )
