"""Rate limits: requests of each key, and wrong keys from each address.

Each limit is a token bucket, stored as a number: the time at which the bucket is full again (GCRA,
https://en.wikipedia.org/wiki/Generic_cell_rate_algorithm). Every replica counts in its own memory:
a count in the database would cost each request a write.
"""

import ipaddress
import math
import time
from collections.abc import Callable
from threading import Lock

from service.problems import Problem

_BURST_SECONDS = 10.0
_WRONG_KEYS_PER_SECOND, _WRONG_KEYS_AT_ONCE = 1.0, 60
_TRUSTED_SECONDS = 86_400.0  # a day: a guesser must not lock out a daily cron job
_MAX_ENTRIES = 10_000  # above this, entries without effect are dropped


class TokenBuckets:
    """A bucket for each name: it holds `at_once` tokens, and `per_second` tokens flow in."""

    # Example: 5 tokens a second, 50 at once. A token takes 0.2 s to flow in, a full bucket 10 s.
    # A name that took 3 tokens of a full bucket has `full_at` = now + 0.6 s. With `full_at` 10 s
    # ahead the bucket is empty, and the next token comes in 0.2 s.

    def __init__(
        self, per_second: float, at_once: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._each, self._depth = 1.0 / per_second, at_once / per_second
        self._clock, self._lock = clock, Lock()
        self._full_at: dict[str, float] = {}

    def take_token(self, name: str) -> float:
        """Take a token and return 0; from an empty bucket, return the seconds until a token."""
        with self._lock:
            now = self._clock()
            full_at = max(now, self._full_at.get(name, now)) + self._each
            wait = full_at - now - self._depth
            if wait > 1e-9:  # noqa: PLR2004 - less is a rounding error of the line above
                return wait
            self._full_at[name] = full_at
            self._drop_full(now)
            return 0.0

    def seconds_until_token(self, name: str) -> float:
        """Return the seconds until the bucket has a token; take none."""
        with self._lock:
            now = self._clock()
            return max(0.0, self._full_at.get(name, now) + self._each - now - self._depth)

    def _drop_full(self, now: float) -> None:
        """Drop buckets that are full again: a name without a bucket starts with a full bucket."""
        if len(self._full_at) > _MAX_ENTRIES:
            self._full_at = {name: at for name, at in self._full_at.items() if at > now}


class RateLimits:
    """The limits that each request passes.

    Call `check_address` before looking up the key, then `count_request` if the key is valid or
    `count_wrong_key` if not.
    """

    def __init__(self, per_second: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._keys = TokenBuckets(per_second, max(1.0, per_second * _BURST_SECONDS), clock)
        self._wrong = TokenBuckets(_WRONG_KEYS_PER_SECOND, _WRONG_KEYS_AT_ONCE, clock)
        self._trusted_until: dict[str, float] = {}  # by the hash of the key

    def check_address(self, address: str, digest: str) -> None:
        """Refuse an address that sent too many wrong keys, before a database query is spent on it.

        A key that was valid within a day passes: users who share an address with a guesser, behind
        a NAT for example, can go on.

        Raises:
            Problem: 429.
        """
        if self._trusted_until.get(digest, -math.inf) < self._clock():
            _refuse_for(
                self._wrong.seconds_until_token(_group_address(address)),
                "wrong API keys from this address",
            )

    def count_wrong_key(self, address: str) -> None:
        """Count a key that was unknown, expired or revoked."""
        self._wrong.take_token(_group_address(address))

    def count_request(self, digest: str) -> None:
        """Count a request with a valid key.

        Raises:
            Problem: 429 if the key has sent too many requests.
        """
        now = self._clock()
        if len(self._trusted_until) > _MAX_ENTRIES:
            self._trusted_until = {d: at for d, at in self._trusted_until.items() if at > now}
        self._trusted_until[digest] = now + _TRUSTED_SECONDS
        _refuse_for(self._keys.take_token(digest), "requests with this API key")


def _refuse_for(wait: float, noun: str) -> None:
    if wait > 0:
        seconds = math.ceil(wait)
        detail = f"too many {noun}; try again in {seconds} s"
        raise Problem(429, "too-many-requests", detail, headers={"Retry-After": str(seconds)})


def _group_address(address: str) -> str:
    """Return an IPv4 address unchanged, and an IPv6 address as its /64: a host has all of that."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:  # a client of a unix socket has no address
        return address
    if isinstance(parsed, ipaddress.IPv4Address):
        return address
    return str(ipaddress.ip_network(f"{parsed}/64", strict=False))
