"""Fleets in a Ray cluster that another process started."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest

from benchmarks.ports import free_port
from workers.fleet.ray_authentication import explain_refusal

pytestmark = pytest.mark.timeout(900)  # seconds, on a busy machine
_LONG = {"num_steps": 1_000_000, "evaluations": 1_000, "log_every": 50}
# A fleet with a Ray that has other private parts than Ray 2.60.
_OTHER_RAY = """
import sys
from workers.fleet import ray_environment
ray_environment.set_for_any_ray()
from ray._private import ray_logging, state
del state.available_resources_per_node
streams = ray_logging.WorkerStandardStreamDispatcher
add = streams.add_handler
streams.add_handler = lambda self, name, handler, level=0: add(self, name, handler)
from workers.fleet.__main__ import main
sys.exit(main())
"""
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


@pytest.mark.parametrize(
    ("mode", "token", "wrong"),
    [
        (None, None, "RAY_AUTH_MODE is not set"),
        ("token", None, "no token is set"),
        ("token", "b" * 64, "the token that is set is not the cluster's"),
    ],
)
def test_a_refused_token_is_explained(mode, token, wrong, monkeypatch):
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    for name, value in {"RAY_AUTH_MODE": mode, "RAY_AUTH_TOKEN": token}.items():
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    said = explain_refusal("head:6379")
    assert wrong in said
    assert "Set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN to the cluster's token" in said
    assert "bbb" not in said


def test_a_fleet_without_the_clusters_token_says_which_variable_to_set(
    cluster, url, start_fleet, monkeypatch, tmp_path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # without a token file of this machine's user
    monkeypatch.setenv("RAY_NUM_REDIS_GET_RETRIES", "1")  # Ray tries for 20 s otherwise
    fleets = {}
    for name, environment in {
        "the token that is set is not the cluster's": {"RAY_AUTH_TOKEN": "b" * 64},
        "no token is set": {},
        "RAY_AUTH_MODE is not set": {"RAY_AUTH_TOKEN": "a" * 64, "RAY_AUTH_MODE": None},
    }.items():
        with monkeypatch.context() as patch:
            patch.delenv("RAY_AUTH_TOKEN")
            for variable, value in environment.items():
                if value is None:
                    patch.delenv(variable)
                else:
                    patch.setenv(variable, value)
            fleets[name] = start_fleet(url, "--ray-address", cluster)
    for name, fleet in fleets.items():
        assert fleet.process.wait(_LONG_SECONDS) == 1
        log = fleet.log.read_text()
        assert name in log
        assert "Set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN to the cluster's token" in log
        assert "Traceback" not in log
        assert "bbbb" not in log


def test_a_fleet_trains_with_a_ray_that_has_other_private_parts(
    cluster, fake, url, start_fleet, make_spec
) -> None:
    fleet = start_fleet(url, "--ray-address", cluster, program=("-c", _OTHER_RAY))
    fleet.wait_until_ready()
    run = fake.offer(make_spec())
    fake.wait_for(lambda: run.finish, _LONG_SECONDS)
    assert (run.finish.outcome, run.failures) == ("succeeded", 0)
    log = fleet.log.read_text()
    for part in ("available_resources_per_node", "global_worker_stdstream_dispatcher"):
        assert f"part={part}" in log
