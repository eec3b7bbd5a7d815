import pytest

from service.cli.demo import measure_fleet
from service.protocol import Timing
from service.runs.schemas import RunView


def run(first, last, inside, *, startup=0.5, kind="trial", number=0):
    """Return a run with steps from `first` to `last` s, of which it trained for `inside` s."""
    spec = {
        "model": {"width": 32, "depth": 1, "head_dim": 16},
        "data": {"source": "stdlib"},
    }
    # Every field is None unless the test needs it.
    none = dict.fromkeys(RunView.model_fields)
    return RunView.model_validate(
        none
        | {
            "id": f"run_{number}",
            "study_id": "st_1",
            "study_name": "a",
            "kind": kind,
            "state": "succeeded",
            "trial_number": number if kind == "trial" else None,
            "rung": 0,
            "branch": 0,
            "seed": 0,
            "attempt": 1,
            "failures": 0,
            "max_attempts": 3,
            "step": 1,
            "num_steps": 1,
            "tokens": 1,
            "num_tokens": 1,
            "cost_flops": 1.0,
            "params": {},
            "spec": spec,
            "timing": Timing(
                first_step_at=first,
                last_step_at=last,
                train_seconds=inside,
                startup_seconds=startup,
            ),
            "created_at": "2026-01-01T00:00:00Z",
        }
    )


def test_two_slots_that_always_train_are_used_wholly():
    runs = [run(0, 10, 10), run(0, 10, 10)]
    assert measure_fleet(runs, 2)["utilization"] == 1.0


def test_a_slot_that_stands_idle_counts_against_the_fleet():
    # Each slot trains for 10 of 20 seconds.
    runs = [run(100, 110, 10), run(110, 120, 10)]
    assert measure_fleet(runs, 2)["utilization"] == 0.5


def test_only_trials_tell_how_quickly_a_trial_starts():
    runs = [run(0, 1, 1, startup=0.7), run(0, 1, 1, startup=9.0, kind="target")]
    assert measure_fleet(runs, 1)["slowest_warm_start_seconds"] == 0.7


@pytest.mark.parametrize("runs", [[], [run(None, None, 0, startup=None)]])
def test_without_a_step_there_is_nothing_to_tell(runs):
    figures = measure_fleet(runs, 2)
    assert figures["utilization"] is None
    assert figures["slowest_warm_start_seconds"] is None
