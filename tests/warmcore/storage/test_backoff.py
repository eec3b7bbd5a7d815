"""Pauses and ends of retries, on a clock that only the test moves."""

import itertools

import pytest

from warmcore.storage.backoff import Backoff, every, retry

HALF_TO_FIVE = Backoff(first_seconds=0.5, max_seconds=5.0)


class FakeClock:
    """A clock that moves by sleeping alone."""

    def __init__(self):
        self.now = 100.0
        self.pauses = []

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds
        self.pauses.append(seconds)


class Operation:
    """Raises an exception of the list at each call, and then returns the number of calls."""

    def __init__(self, *errors):
        self.errors, self.calls = iter(errors), 0

    def __call__(self):
        self.calls += 1
        for error in self.errors:
            raise error
        return self.calls


@pytest.fixture
def clock():
    return FakeClock()


def always(error):
    return Operation(*[error] * 1000)


def test_pauses_double_up_to_the_longest():
    pauses = list(itertools.islice(HALF_TO_FIVE.iterate_pauses(), 6))
    assert pauses == [0.5, 1.0, 2.0, 4.0, 5.0, 5.0]


def test_equal_pauses_stay_equal():
    assert list(itertools.islice(every(0.5).iterate_pauses(), 3)) == [0.5, 0.5, 0.5]


def test_jitter_draws_evenly_between_zero_and_the_pause():
    backoff = Backoff(first_seconds=0.1, max_seconds=5.0, jitter=True)
    rows = [list(itertools.islice(backoff.iterate_pauses(), 8)) for _ in range(2000)]
    ceilings = [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]
    # Of 2000 draws, the smallest is below 1 % of the ceiling but for a chance of 0.99^2000 = 2e-9.
    # The standard deviation of the mean is 0.65 % of the ceiling.
    for ceiling, pauses in zip(ceilings, zip(*rows, strict=True), strict=True):
        assert 0 <= min(pauses) < 0.01 * ceiling
        assert 0.99 * ceiling < max(pauses) <= ceiling
        assert abs(sum(pauses) / len(pauses) - ceiling / 2) < 0.05 * ceiling


def test_an_operation_is_called_until_it_returns(clock):
    operation = Operation(OSError(), OSError(), OSError())
    assert retry(operation, HALF_TO_FIVE, on=OSError, clock=clock) == 4
    assert clock.pauses == [0.5, 1.0, 2.0]


def test_an_operation_that_returns_at_once_is_not_waited_for(clock):
    assert retry(Operation(), HALF_TO_FIVE, on=OSError, deadline=0.0, clock=clock) == 1
    assert clock.pauses == []


def test_another_exception_is_raised_at_once(clock):
    operation = Operation(ValueError("wrong"))
    with pytest.raises(ValueError, match="wrong"):
        retry(operation, HALF_TO_FIVE, on=(OSError, EOFError), clock=clock)
    assert operation.calls == 1


def test_an_exception_that_is_not_worth_it_is_raised_at_once(clock):
    operation = always(FileNotFoundError())
    with pytest.raises(FileNotFoundError):
        retry(
            operation,
            HALF_TO_FIVE,
            on=OSError,
            is_worth_retrying=lambda error: not isinstance(error, FileNotFoundError),
            clock=clock,
        )
    assert operation.calls == 1


def test_the_last_attempt_is_the_first_that_fails_after_the_deadline(clock):
    operation = always(OSError("away"))
    with pytest.raises(OSError, match="away"):
        retry(operation, HALF_TO_FIVE, on=OSError, deadline=clock.now + 3.5, clock=clock)
    assert clock.pauses == [0.5, 1.0, 2.0, 4.0]  # at 3.5 s the deadline is not yet over
    assert operation.calls == 5


def test_a_deadline_that_is_over_leaves_one_attempt(clock):
    operation = always(OSError())
    with pytest.raises(OSError):
        retry(operation, HALF_TO_FIVE, on=OSError, deadline=clock.now - 1, clock=clock)
    assert (operation.calls, clock.pauses) == (1, [])


def test_attempts_are_counted(clock):
    operation = always(OSError())
    with pytest.raises(OSError):
        retry(operation, every(2.0), on=OSError, max_attempts=3, clock=clock)
    assert (operation.calls, clock.pauses) == (3, [2.0, 2.0])


def test_each_pause_is_announced_with_its_exception_but_the_last_failure_is_not(clock):
    errors = [OSError(1), OSError(2), OSError(3)]
    announced = []
    with pytest.raises(OSError):
        retry(
            Operation(*errors),
            every(1.0),
            on=OSError,
            max_attempts=3,
            before_pause=lambda error: announced.append((error, len(clock.pauses))),
            clock=clock,
        )
    assert announced == [(errors[0], 0), (errors[1], 1)]


def test_an_exception_before_a_pause_ends_the_retries(clock):
    class DrainedError(Exception):
        pass

    def stop(_):
        raise DrainedError

    operation = always(OSError())
    with pytest.raises(DrainedError):
        retry(operation, HALF_TO_FIVE, on=OSError, before_pause=stop, clock=clock)
    assert (operation.calls, clock.pauses) == (1, [])


def test_a_pause_can_depend_on_the_exception(clock):
    operation = Operation(OSError(7), OSError(0))
    retry(
        operation,
        HALF_TO_FIVE,
        on=OSError,
        adjust_pause=lambda error, pause: error.args[0] + pause,
        clock=clock,
    )
    assert clock.pauses == [7.5, 1.0]
