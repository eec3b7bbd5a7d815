"""Limits on how often: of each key, and of wrong keys from each address. In one process's memory.

A token bucket, kept as the one moment at which it will be full again (GCRA). Every replica counts
for itself: a limit in the database would cost every request a write.
"""

import ipaddress
import math
import time
from collections.abc import Callable
from threading import Lock

from service.problems import Problem

_BURST_SECONDS = 10.0
_WRONG_KEYS_PER_SECOND, _WRONG_KEYS_AT_ONCE = 1.0, 60
_GOOD_FOR_SECONDS = 86_400.0  # a guesser must not shut out who comes by once a day
_FORGET_ABOVE = 10_000


class TokenBuckets:
    """One bucket for each name: `at_once` tokens, refilled at `per_second`."""

    def __init__(
        self, per_second: float, at_once: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._each, self._depth = 1.0 / per_second, at_once / per_second
        self._clock, self._lock = clock, Lock()
        self._full_at: dict[str, float] = {}

    def take_token(self, name: str) -> float:
        """Take a token; give 0, or the seconds until there is one."""
        with self._lock:
            now = self._clock()
            full_at = max(now, self._full_at.get(name, now)) + self._each
            wait = full_at - now - self._depth
            if wait > 1e-9:  # noqa: PLR2004 - rounding
                return wait
            self._full_at[name] = full_at
            self._forget(now)
            return 0.0

    def seconds_until_token(self, name: str) -> float:
        """The seconds until there is a token; takes none."""
        with self._lock:
            now = self._clock()
            return max(0.0, self._full_at.get(name, now) + self._each - now - self._depth)

    def _forget(self, now: float) -> None:
        """A full bucket is as good as none."""
        if len(self._full_at) > _FORGET_ABOVE:
            self._full_at = {name: at for name, at in self._full_at.items() if at > now}


class RateLimits:
    """What a request passes on its way in: `knock` before its key is looked up, then the other."""

    def __init__(self, per_second: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._keys = TokenBuckets(per_second, max(1.0, per_second * _BURST_SECONDS), clock)
        self._wrong = TokenBuckets(_WRONG_KEYS_PER_SECOND, _WRONG_KEYS_AT_ONCE, clock)
        self._good_until: dict[str, float] = {}

    def check_address(self, address: str, digest: str) -> None:
        """Refuse an address that has tried too many wrong keys, before the database is asked.

        A key that was good lately passes: who shares an address with a guesser is not shut out.

        Raises:
            Problem: 429.
        """
        if self._good_until.get(digest, -math.inf) < self._clock():
            _refuse(
                self._wrong.seconds_until_token(_network(address)),
                "wrong API keys from this address",
            )

    def count_wrong_key(self, address: str) -> None:
        """Count a key that let nobody in."""
        self._wrong.take_token(_network(address))

    def count_request(self, digest: str) -> None:
        """Count a request with a good key.

        Raises:
            Problem: 429.
        """
        now = self._clock()
        if len(self._good_until) > _FORGET_ABOVE:
            self._good_until = {d: at for d, at in self._good_until.items() if at > now}
        self._good_until[digest] = now + _GOOD_FOR_SECONDS
        _refuse(self._keys.take_token(digest), "requests with this API key")


def _refuse(wait: float, what: str) -> None:
    if wait > 0:
        seconds = math.ceil(wait)
        detail = f"too many {what}; try again in {seconds} s"
        raise Problem(429, "too-many-requests", detail, headers={"Retry-After": str(seconds)})


def _network(address: str) -> str:
    """An address, or the /64 that a host of IPv6 has all of."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:  # a unix socket has none
        return address
    if isinstance(parsed, ipaddress.IPv4Address):
        return address
    return str(ipaddress.ip_network(f"{parsed}/64", strict=False))
