"""A real fleet, its Ray and its processes against a small real server."""

import os
import signal
import statistics
import time

import pytest

from warmcore.spec import CheckpointRef

_LONG = {"num_steps": 1_000_000, "train": {"evaluations": 1_000, "log_every": 50}}


@pytest.fixture(scope="module")
def fleet(shared_url, start_fleet):
    fleet = start_fleet(shared_url, "--cpus", "2", "--checkpoint-seconds", "0.2")
    fleet.wait_until_ready()
    return fleet


def test_trials_run_in_warm_processes_and_start_in_under_two_seconds(
    fleet, shared_fake, make_lease
) -> None:
    pids = fleet.worker_pids()
    assert len(pids) == 2
    runs = [shared_fake.offer(make_lease()) for _ in range(6)]
    shared_fake.wait_for(lambda: all(run.finish for run in runs))
    assert {run.finish.outcome for run in runs} == {"succeeded"}
    assert fleet.worker_pids() == pids
    assert max(run.finish.timing.startup_seconds for run in runs) < 2.0


def test_a_slot_that_falls_free_is_leased_again_at_once(fleet, shared_fake, make_lease) -> None:
    runs = [shared_fake.offer(make_lease()) for _ in range(8)]
    shared_fake.wait_for(lambda: all(run.finish for run in runs))
    ends = sorted(run.finished_at for run in runs)
    starts = sorted(run.leased_at for run in runs)
    waits = [start - end for start, end in zip(starts[2:], ends, strict=False)]
    assert statistics.median(waits) < 0.2


def test_a_run_is_only_asked_for_when_its_resources_are_free(
    fleet, shared_fake, make_lease
) -> None:
    run = shared_fake.offer(make_lease(**_LONG))
    shared_fake.wait_for(lambda: run.curve)
    asked = len(shared_fake.requests)
    shared_fake.wait_for(lambda: len(shared_fake.requests) > asked + 1)
    assert {r.resources.cpus for r in shared_fake.requests[asked + 1 :]} == {1}
    run.decision = "cancel"
    while f"run={run.lease.run_id} outcome=cancelled" not in fleet.log.read_text():
        time.sleep(0.05)


def test_a_run_whose_process_is_killed_is_reported_and_the_fleet_goes_on(
    fleet, shared_fake, make_lease
) -> None:
    run = shared_fake.offer(make_lease(**_LONG))
    shared_fake.wait_for(lambda: run.curve)
    (victim,) = [p for p, title in fleet.descendants().items() if title == "ray::run_lease"]
    os.kill(victim, signal.SIGKILL)
    shared_fake.wait_for(lambda: run.finish)
    assert (run.finish.outcome, run.finish.retryable) == ("failed", True)
    assert "WorkerCrashedError" in run.finish.error
    after = shared_fake.offer(make_lease())
    shared_fake.wait_for(lambda: after.finish)
    assert after.finish.outcome == "succeeded"


def test_a_spec_that_cannot_run_fails_for_good_and_says_why(
    fleet, shared_fake, make_lease, tmp_path
) -> None:
    lease = make_lease()
    data = lease.spec.data.model_copy(update={"source": str(tmp_path / "nothing")})
    spec = lease.spec.model_copy(update={"data": data})
    run = shared_fake.offer(lease.model_copy(update={"spec": spec}))
    shared_fake.wait_for(lambda: run.finish)
    assert (run.finish.outcome, run.finish.retryable) == ("failed", False)
    assert "nothing" in run.finish.error
    assert "\x1b" not in run.finish.error


def test_sigterm_publishes_a_checkpoint_gives_every_run_back_and_leaves_no_process(
    fleet, shared_fake, make_lease
) -> None:
    runs = [shared_fake.offer(make_lease(**_LONG)) for _ in range(2)]
    shared_fake.wait_for(lambda: all(run.checkpoints for run in runs))
    below = fleet.descendants()
    fleet.signal(signal.SIGTERM)
    assert fleet.process.wait(timeout=30) == 0
    for run in runs:
        assert run.finish.outcome == "released"
        assert run.checkpoints[-1].step == run.curve[-1].step or run.curve[-1].step % 50 == 0
        assert run.checkpoints[-1].step >= run.curve[-1].step
    _wait_until_gone(set(below))


def test_after_kill_9_nothing_trains_on_and_a_fresh_fleet_resumes(
    shared_url, shared_fake, start_fleet, make_lease
) -> None:
    options = ("--cpus", "1", "--checkpoint-seconds", "0.2")
    fleet = start_fleet(shared_url, *options)
    fleet.wait_until_ready()
    run = shared_fake.offer(make_lease(**_LONG))
    shared_fake.wait_for(lambda: len(run.checkpoints) > 1)
    workers = fleet.worker_pids()
    fleet.signal(signal.SIGKILL)
    fresh = start_fleet(shared_url, *options)
    _wait_until_gone(workers)
    reported = len(run.batches)
    refs = tuple(CheckpointRef(uri=c.uri, hash=c.hash) for c in reversed(run.checkpoints))
    lease = run.lease.model_copy(
        update={"run_id": "again", "attempt": 2, "resume_from": refs, "lease_token": "again"}
    )
    again = shared_fake.offer(lease)
    fresh.wait_until_ready()
    shared_fake.wait_for(lambda: again.curve)
    assert again.curve[0].step > run.checkpoints[-1].step
    assert len(run.batches) == reported
    _second_signal_exits_at_once(fresh, shared_fake)


def _second_signal_exits_at_once(fleet, fake) -> None:
    fake.away = True  # draining now waits for the service
    fleet.signal(signal.SIGINT)
    time.sleep(1.0)
    assert fleet.process.poll() is None
    fleet.signal(signal.SIGTERM)
    assert fleet.process.wait(timeout=3) == 128 + signal.SIGTERM
    fake.away = False


def _wait_until_gone(pids: set[int], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while alive := {pid for pid in pids if _is_alive(pid)}:
        assert time.monotonic() < deadline, alive
        time.sleep(0.1)


def _is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:  # noqa: PTH123 - a path of the kernel's
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
