"""The cache of callers: it answers for a few seconds, and its size is bounded."""

from service.access.caller import Caller
from service.access.caller_cache import KEPT_SECONDS, CallerCache

EVERYTHING = Caller(key_id="key_1", scopes=frozenset({"work"}), project=None)


def test_a_key_is_taken_as_good_for_seconds_after_it_was_looked_up_and_no_longer():
    now = [100.0]
    cache = CallerCache(clock=lambda: now[0])
    assert cache.get_caller("a") is None
    cache.keep_caller("a", EVERYTHING, found_at=cache.read_clock())
    now[0] += KEPT_SECONDS - 0.01
    assert cache.get_caller("a") is EVERYTHING
    assert cache.get_caller("b") is None
    now[0] += 0.02
    assert cache.get_caller("a") is None


def test_only_so_many_callers_are_kept():
    cache = CallerCache(clock=lambda: 0.0)
    for i in range(5000):
        cache.keep_caller(str(i), EVERYTHING, 0.0)
    assert len(cache._callers) <= 1024
    assert cache.get_caller("4999") is EVERYTHING
