"""A real fleet, its Ray and its processes against a small real server."""

import os
import signal
import statistics
import time
from collections.abc import Callable

import pytest

pytestmark = pytest.mark.timeout(900)  # seconds, on a busy machine
_LONG = {"num_steps": 1_000_000, "evaluations": 1_000, "log_every": 50}
_LONG_SECONDS = 90.0  # long enough for a busy machine
_DRAIN_SECONDS = 60.0  # the limit that the fleet is given for runs that do not end


@pytest.fixture(scope="module")
def fleet(shared_url, start_fleet):
    fleet = start_fleet(shared_url, "--cpus", "2", "--checkpoint-seconds", "0.2")
    fleet.wait_until_ready()
    return fleet


def test_trials_run_in_warm_processes_and_start_in_under_two_seconds(
    fleet, shared_fake, make_spec
) -> None:
    pids = fleet.worker_pids()
    assert len(pids) == 2
    runs = [shared_fake.offer(make_spec()) for _ in range(6)]
    shared_fake.wait_for(lambda: all(run.finish for run in runs))
    assert {run.finish.outcome for run in runs} == {"succeeded"}
    # No process was started for a run: all six ran in the two processes of the warm-up.
    assert fleet.worker_pids() == pids
    assert statistics.median(run.finish.timing.startup_seconds for run in runs) < 2.0


def test_a_slot_that_falls_free_is_leased_again_at_once(fleet, shared_fake, make_spec) -> None:
    runs = [shared_fake.offer(make_spec()) for _ in range(8)]
    shared_fake.wait_for(lambda: all(run.finish for run in runs))
    ends = sorted(run.finished_at for run in runs)
    starts = sorted(run.leased_at for run in runs)
    # Two slots: the third start follows the first end, and so on.
    waits = [start - end for start, end in zip(starts[2:], ends, strict=False)]
    assert statistics.median(waits) < 0.4  # a poll may wait for 1 s


def test_a_run_is_only_asked_for_when_its_resources_are_free(fleet, shared_fake, make_spec) -> None:
    run = shared_fake.offer(make_spec(**_LONG))
    shared_fake.wait_for(lambda: run.curve)
    # The request that is pending may still offer both CPUs.
    asked = len(shared_fake.requests)
    shared_fake.wait_for(lambda: len(shared_fake.requests) > asked + 1)
    assert {r.resources.cpus for r in shared_fake.requests[asked + 1 :]} == {1}
    shared_fake.cancel(run)
    _wait_until(lambda: f"run={run.id} attempt=1 outcome=cancelled" in fleet.log.read_text())


def test_what_a_worker_process_logs_is_in_the_fleets_log_and_says_its_run(
    fleet, shared_fake, make_spec
) -> None:
    run = shared_fake.offer(make_spec())
    shared_fake.wait_for(lambda: run.finish)
    words = {"message=training", "message=checkpoint", "message=lease", "message=end"}

    def are_said():
        lines = fleet.log.read_text().splitlines()
        mine = "\n".join(line for line in lines if f"run={run.id} attempt=1" in line)
        return all(word in mine for word in words)

    _wait_until(are_said)
    assert all(line.startswith("time=") for line in fleet.log.read_text().splitlines())


def test_a_run_whose_process_is_killed_is_reported_and_goes_on_in_another(
    fleet, shared_fake, make_spec
) -> None:
    run = shared_fake.offer(make_spec(**_LONG))
    shared_fake.wait_for(lambda: run.checkpoints)
    (victim,) = [p for p, title in fleet.descendants().items() if title == "ray::run_lease"]
    os.kill(victim, signal.SIGKILL)
    shared_fake.wait_for(lambda: run.finish)
    assert (run.finish.outcome, run.finish.retryable) == ("failed", True)
    assert "WorkerCrashedError" in run.finish.error
    shared_fake.wait_for(lambda: run.batches[-1].attempt == 2 and run.batches[-1].measurements)
    shared_fake.cancel(run)


def test_a_spec_that_cannot_run_fails_for_good_and_says_why(
    fleet, shared_fake, make_spec, tmp_path
) -> None:
    spec = make_spec()
    data = spec.data.model_copy(update={"source": str(tmp_path / "nothing")})
    run = shared_fake.offer(spec.model_copy(update={"data": data}))
    shared_fake.wait_for(lambda: run.finish)
    assert (run.finish.outcome, run.finish.retryable) == ("failed", False)
    assert "nothing" in run.finish.error
    assert "\x1b" not in run.finish.error


def test_sigterm_publishes_a_checkpoint_gives_every_run_back_and_leaves_no_process(
    fleet, shared_fake, make_spec
) -> None:
    runs = [shared_fake.offer(make_spec(**_LONG)) for _ in range(2)]
    shared_fake.wait_for(lambda: all(run.checkpoints for run in runs))
    below = fleet.descendants()
    fleet.signal(signal.SIGTERM)
    assert fleet.process.wait(timeout=_LONG_SECONDS) == 0
    for run in runs:
        assert run.finish.outcome == "released"
        # The curve ends at the checkpoint, or at the last logged step before it.
        assert run.checkpoints[-1].step == run.curve[-1].step or run.curve[-1].step % 50 == 0
        assert run.checkpoints[-1].step >= run.curve[-1].step
        assert run.state == "queued"
        shared_fake.cancel(run)
    _wait_until_gone(set(below))


@pytest.mark.parametrize("part", ["raylet", "agent.py"])
def test_a_signal_while_ray_starts_ends_the_fleet_at_once_and_leaves_no_process(
    shared_url, start_fleet, part
) -> None:
    """Agents outlive the raylet that started them by up to a minute."""
    fleet = start_fleet(shared_url, "--cpus", "1")
    _wait_until(lambda: any(part in title for title in fleet.descendants().values()))
    time.sleep(0.15)  # by now an agent has started, but does not yet watch its raylet
    below = fleet.descendants()
    fleet.signal(signal.SIGTERM)
    assert (
        fleet.process.wait(timeout=_LONG_SECONDS) == 128 + signal.SIGTERM
    )  # ended by the signal, without a drain
    assert "message=ready" not in fleet.log.read_text()
    _wait_until_gone(set(below))


def test_after_kill_9_nothing_trains_on_and_a_fresh_fleet_resumes(
    shared_url, shared_fake, start_fleet, make_spec
) -> None:
    options = ("--cpus", "1", "--checkpoint-seconds", "0.2")
    fleet = start_fleet(shared_url, *options)
    fleet.wait_until_ready()
    run = shared_fake.offer(make_spec(**_LONG), lease_seconds=5.0)
    shared_fake.wait_for(lambda: len(run.checkpoints) > 1)
    workers = fleet.worker_pids()
    fleet.signal(signal.SIGKILL)
    fresh = start_fleet(shared_url, *options)
    _wait_until_gone(workers)
    reported, last = len(run.batches), run.checkpoints[-1]
    shared_fake.wait_for(lambda: run.batches[-1].attempt == 2, seconds=90)
    shared_fake.wait_for(lambda: run.batches[-1].measurements)
    after = run.batches[reported:]
    assert {batch.attempt for batch in after} == {2}
    steps = [point.step for batch in after for point in batch.measurements]
    assert steps[0] > last.step
    _second_signal_exits_at_once(fresh, shared_fake)


def _second_signal_exits_at_once(fleet, fake) -> None:
    fake.away = True  # the drain waits for the service
    fleet.signal(signal.SIGINT)
    time.sleep(1.0)
    assert fleet.process.poll() is None
    fleet.signal(signal.SIGTERM)
    assert fleet.process.wait(timeout=_DRAIN_SECONDS / 2) == 128 + signal.SIGTERM
    fake.away = False


def _wait_until(done: Callable[[], object], seconds: float = _LONG_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _wait_until_gone(pids: set[int]) -> None:
    _wait_until(
        lambda: not any(map(_is_alive, pids)), seconds=30.0
    )  # Ray itself would end them after 60 s


def _is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:  # noqa: PTH123 - a file of the kernel
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
