"""What a run that ended in an exception tells the service: pure, from the exception alone.

Only an `UnrunnableError` fails for good: the spec, the data or the base is wrong, and would be for
the next worker too. Lost processes, lost nodes and memory are worth another attempt elsewhere, as
is any other `ValueError`: JSON that is none, a device that is not there.
"""

import re

from ray.exceptions import TaskCancelledError

from service.protocol import FinishRequest

_MAX_CHARS = 8_000
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class UnrunnableError(Exception):
    """The run's spec, data or base is wrong: no other worker could run it either."""


def describe_failure(error: BaseException, *, draining: bool) -> FinishRequest:
    """Say how an attempt ended that raised `error`; a draining fleet gives back what it stopped."""
    if isinstance(error, UnrunnableError):
        return FinishRequest(outcome="failed", error=_format_error(error), retryable=False)
    if draining or isinstance(error, TaskCancelledError):
        return FinishRequest(outcome="released")
    return FinishRequest(outcome="failed", error=_format_error(error), retryable=True)


def _format_error(error: BaseException) -> str:
    """Kind, message and traceback from Ray; of a long one the end, which names the cause."""
    text = _COLOUR.sub("", f"{type(error).__name__}: {error}").replace(
        "\0", ""
    )  # no SQL text has it
    return text if len(text) <= _MAX_CHARS else f"...{text[-_MAX_CHARS:]}"
