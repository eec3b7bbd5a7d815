import pytest
from ray.exceptions import OutOfMemoryError, RayTaskError, TaskCancelledError, WorkerCrashedError

from workers.failures import UnrunnableError, describe_failure


def _raised_in_a_task(cause: Exception) -> Exception:
    return RayTaskError(
        "run_lease", f"\x1b[36mtraceback\x1b[39m\n{cause}", cause
    ).as_instanceof_cause()


def test_a_wrong_spec_is_not_tried_again() -> None:
    finish = describe_failure(_raised_in_a_task(UnrunnableError("width 3")), draining=False)
    assert (finish.outcome, finish.retryable) == ("failed", False)
    assert finish.error.endswith("traceback\nwidth 3")


@pytest.mark.parametrize(
    "error",
    [
        WorkerCrashedError(),
        OutOfMemoryError("node"),
        _raised_in_a_task(RuntimeError("CUDA out of memory")),
        _raised_in_a_task(MemoryError()),
        _raised_in_a_task(ValueError("no JSON")),
    ],
)
def test_what_is_not_the_specs_fault_is_tried_again(error: Exception) -> None:
    finish = describe_failure(error, draining=False)
    assert (finish.outcome, finish.retryable) == ("failed", True)
    assert finish.error


@pytest.mark.parametrize("error", [TaskCancelledError(), _raised_in_a_task(TaskCancelledError())])
def test_a_run_that_was_drained_before_it_began_is_given_back(error: Exception) -> None:
    assert describe_failure(error, draining=False).outcome == "released"


def test_what_a_draining_fleet_kills_it_gives_back() -> None:
    assert describe_failure(WorkerCrashedError(), draining=True).outcome == "released"


def test_an_error_is_text_that_a_database_takes() -> None:
    assert describe_failure(RuntimeError("a\0b"), draining=False).error == "RuntimeError: ab"


def test_of_a_long_error_the_end_is_kept() -> None:
    finish = describe_failure(RuntimeError("x" * 100_000 + "the cause"), draining=False)
    assert finish.error.endswith("the cause")
    assert len(finish.error) <= 8_003
