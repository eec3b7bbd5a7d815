"""The limit on a key's calls in progress: each key has its own, and a place is free again."""

import pytest

from service.access.concurrency_limits import ConcurrencyLimit
from service.problems import Problem


@pytest.fixture
def limit():
    return ConcurrencyLimit(2, kind="too-many", noun="calls open", retry_after_seconds=5)


def test_a_key_has_its_most_calls_and_another_key_its_own(limit):
    with limit.hold_place("a"), limit.hold_place("a"), limit.hold_place("b"):
        with pytest.raises(Problem, match="this API key has 2 calls open here") as refused:
            limit.hold_place("a").__enter__()
        assert (refused.value.status, refused.value.kind) == (429, "too-many")
        assert refused.value.headers == {"Retry-After": "5"}
        assert limit.num_calls == 3


def test_a_call_that_ends_by_an_error_frees_its_place_and_its_key_is_dropped(limit):
    for _ in range(3):
        with pytest.raises(KeyError), limit.hold_place("a"):
            raise KeyError("broken")
    assert limit.num_calls == 0
    assert not limit._calls_of_key
