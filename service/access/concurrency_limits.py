"""A limit on the calls of an API key that are in progress at a replica at the same time.

`rate_limits` counts requests a second. It does not count long-polls and event streams by how long
they last.
"""

from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager

from service.problems import Problem


class ConcurrencyLimit:
    """A count of each key's calls in progress, used on the event loop's thread only.

    `kind` is the type of the problem for a call too many; `noun` names the calls in its message.
    """

    def __init__(
        self, most_per_key: int, *, kind: str, noun: str, retry_after_seconds: int
    ) -> None:
        self._most = most_per_key
        self._kind, self._noun, self._retry_after = kind, noun, str(retry_after_seconds)
        self._calls_of_key = Counter[str]()

    @property
    def num_calls(self) -> int:
        """The calls in progress, of all keys together."""
        return self._calls_of_key.total()

    @contextmanager
    def hold_place(self, key_id: str) -> Generator[None]:
        """Count a call of this key while the block runs.

        Raises:
            Problem: 429 when the key already has as many calls in progress as it may.
        """
        if self._calls_of_key[key_id] >= self._most:
            detail = f"this API key has {self._most} {self._noun} here, its most"
            raise Problem(429, self._kind, detail, headers={"Retry-After": self._retry_after})
        self._calls_of_key[key_id] += 1
        try:
            yield
        finally:
            self._calls_of_key[key_id] -= 1
            # Adding an empty counter drops keys at 0: the counter stays as small as its use.
            self._calls_of_key += Counter()
