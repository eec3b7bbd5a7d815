"""Requests that finish an attempt after an exception; they depend on the exception alone.

Only an `UnrunnableError` fails a run without a retry: the spec, the data or the base is wrong, and
the next worker would fail too. The service retries after a lost process, a lost node and a lack of
memory. It retries after another `ValueError` too, for example malformed JSON or a missing device.
"""

import re

from ray.exceptions import TaskCancelledError

from service.protocol import FinishRequest

_MAX_CHARS = 8_000
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class UnrunnableError(Exception):
    """The run's spec, data or base is wrong: no other worker could run it either."""


def describe_failure(error: BaseException, *, draining: bool) -> FinishRequest:
    """Return the finish of an attempt that raised `error`; a draining fleet releases its runs."""
    if isinstance(error, UnrunnableError):
        return FinishRequest(outcome="failed", error=_format_error(error), retryable=False)
    if draining or isinstance(error, TaskCancelledError):
        return FinishRequest(outcome="released")
    return FinishRequest(outcome="failed", error=_format_error(error), retryable=True)


def _format_error(error: BaseException) -> str:
    """Return type, message and Ray's traceback; of a long text the end, which names the cause."""
    # PostgreSQL text cannot hold NUL.
    text = _COLOUR.sub("", f"{type(error).__name__}: {error}").replace("\0", "")
    return text if len(text) <= _MAX_CHARS else f"...{text[-_MAX_CHARS:]}"
