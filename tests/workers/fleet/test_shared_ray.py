"""Two fleets in the same Ray cluster."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest

from benchmarks.ports import free_port

_LONG = {"num_steps": 1_000_000, "evaluations": 1_000, "log_every": 50}
_LONG_SECONDS = 90.0  # long enough for a busy machine


@pytest.fixture
def cluster(monkeypatch, tmp_path):
    """The address of a Ray cluster with a single CPU."""
    for name, value in {"MODE": "token", "TOKEN": "a" * 64}.items():
        monkeypatch.setenv(f"RAY_AUTH_{name}", value)
    address = f"127.0.0.1:{free_port()}"
    start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
    options = ["--num-cpus=1", "--include-dashboard=false", "--disable-usage-stats"]
    options += [f"--port={address.rpartition(':')[2]}", "--object-store-memory=80000000"]
    with (tmp_path / "ray.log").open("w") as log:
        ray = subprocess.Popen(
            [*start, *options], stdout=log, stderr=log, start_new_session=True, env=os.environ
        )
    try:
        _wait_until_started(tmp_path / "ray.log")
        yield address
    finally:
        _end(ray)


def _wait_until_started(log):
    """Wait for Ray: a fleet that starts before its Ray exits."""
    deadline = time.monotonic() + _LONG_SECONDS
    while "Ray runtime started" not in log.read_text():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


def _end(ray):
    ray.terminate()  # with `--block` the cluster ends together with this process
    with contextlib.suppress(subprocess.TimeoutExpired):
        ray.wait(20)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(ray.pid, signal.SIGKILL)
    ray.wait()


def test_a_run_whose_place_another_fleet_took_waits_for_its_turn_and_fails_nothing(
    cluster, fake, url, start_fleet, make_spec
) -> None:
    fleets = [start_fleet(url, "--ray-address", cluster, "--name", name) for name in "ab"]
    for fleet in fleets:
        fleet.wait_until_ready()
    asked = lambda: {"a", "b"} <= {request.worker for request in fake.requests}  # noqa: E731
    fake.wait_for(asked, _LONG_SECONDS)
    with fake.changed:  # both fleets ask for the same CPU
        runs = [fake.offer(make_spec(**_LONG), lease_seconds=12.0) for _ in range(2)]
    fake.wait_for(lambda: any(run.finish for run in runs), _LONG_SECONDS)
    fake.wait_for(lambda: any(run.curve for run in runs), _LONG_SECONDS)
    (trained,) = [run for run in runs if run.curve]
    (waited,) = [run for run in runs if run is not trained]
    fake.wait_for(lambda: waited.finish, _LONG_SECONDS)
    assert (waited.finish.outcome, waited.failures, waited.curve) == ("released", 0, [])
    fake.cancel(trained)
    fake.wait_for(lambda: waited.curve, _LONG_SECONDS)
    assert (waited.failures, trained.failures) == (0, 0)
    fake.cancel(waited)
