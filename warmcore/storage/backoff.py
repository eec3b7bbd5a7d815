"""Retries with growing pauses: the only copy, for the service and for the workers.

Every package may import the module: it needs neither torch nor another module of ours.
"""

import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar

T = TypeVar("T")
E = TypeVar("E", bound=Exception)


class Clock(Protocol):
    """A clock that can wait, as the module `time` can. Tests pass a clock of their own."""

    def monotonic(self) -> float:
        """Return the seconds since some fixed moment."""
        ...

    def sleep(self, seconds: float, /) -> None:
        """Wait for `seconds`."""
        ...


@dataclass(frozen=True, kw_only=True)
class Backoff:
    """Pauses between attempts: the first, then twice the pause before, up to the longest.

    With `jitter` each pause is drawn evenly between 0 and that length ("full jitter").
    """

    first_seconds: float
    max_seconds: float
    jitter: bool = False

    def iterate_pauses(self) -> Iterator[float]:
        """Yield the pauses in seconds; the iterator never ends."""
        # Without jitter, from 0.5 s to at most 5 s: 0.5, 1, 2, 4, 5, 5, ...
        # With jitter the clients that an outage cut off together do not return together.
        ceiling = self.first_seconds
        while True:
            yield random.uniform(0, ceiling) if self.jitter else ceiling  # noqa: S311 - no secret
            ceiling = min(2 * ceiling, self.max_seconds)


def every(seconds: float) -> Backoff:
    """Return the backoff with equal pauses of `seconds`."""
    return Backoff(first_seconds=seconds, max_seconds=seconds)


def retry(
    operation: Callable[[], T],
    backoff: Backoff,
    *,
    on: type[E] | tuple[type[E], ...],
    deadline: float = math.inf,
    max_attempts: float = math.inf,
    is_worth_retrying: Callable[[E], bool] = lambda _: True,
    before_pause: Callable[[E], object] = lambda _: None,
    adjust_pause: Callable[[E, float], float] = lambda _, pause: pause,
    clock: Clock = time,
) -> T:
    """Return the result of `operation`, called again after each exception of the types in `on`.

    Args:
        operation: Called until it returns.
        backoff: The pauses between two calls.
        on: Types of the exceptions after which `operation` may be called again.
        deadline: Moment of `clock` after which a failure is the last. A pause may pass it.
        max_attempts: Number of calls.
        is_worth_retrying: Returns, for an exception, whether another call may succeed.
        before_pause: Called before each pause. It may log, and it may raise to end the retries.
        adjust_pause: Returns the seconds to wait, from the exception and the pause of `backoff`.
        clock: The source of time.

    Raises:
        Exception: the last exception of `operation`, or the exception that `before_pause` raised.
    """
    pauses = backoff.iterate_pauses()
    attempt = 1
    while True:
        try:
            return operation()
        except on as error:
            is_last = attempt >= max_attempts or clock.monotonic() > deadline
            if is_last or not is_worth_retrying(error):
                raise
            before_pause(error)
            seconds = adjust_pause(error, next(pauses))
        # Outside of the handler: a pause keeps no traceback, and with it no arrays, alive.
        clock.sleep(seconds)
        attempt += 1
