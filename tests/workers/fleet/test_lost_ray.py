"""A fleet that lost Ray reports its runs and exits, and a supervisor starts another fleet."""

import os
import signal
import time

import pytest

pytestmark = pytest.mark.timeout(900)  # seconds, on a busy machine
_LONG = {"num_steps": 1_000_000, "evaluations": 1_000, "log_every": 50}


@pytest.mark.parametrize("part", ["raylet", "gcs_server"])
def test_a_fleet_that_lost_its_ray_reports_its_runs_and_fails(
    part, fake, url, start_fleet, make_spec
) -> None:
    fleet = start_fleet(url, "--cpus", "2", "--checkpoint-seconds", "0.2")
    fleet.wait_until_ready()
    run = fake.offer(make_spec(**_LONG))
    fake.wait_for(lambda: run.checkpoints)
    workers = fleet.worker_pids()
    (victim,) = [p for p, t in fleet.descendants().items() if t.split(" ")[0].endswith(f"/{part}")]
    os.kill(victim, signal.SIGKILL)
    assert fleet.process.wait(timeout=90) == 1
    assert (run.finish.outcome, run.finish.retryable) == ("failed", True)
    assert "message=lost" in fleet.log.read_text()
    _wait_until(lambda: not [pid for pid in workers if _trains(pid)])


def _wait_until(done, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _trains(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/cmdline") as title:  # noqa: PTH123 - a file of the kernel
            return title.read().startswith("ray::run_lease")
    except OSError:
        return False
