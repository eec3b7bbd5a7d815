"""`warmscale up` as a user runs it."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import httpx
import psutil
import pytest

from tests.conftest import scratch

LONG = 90  # seconds; for a machine that is busy with something else


class Up:
    """One supervisor process, and everything that it has started."""

    def __init__(self, home, *options):
        environment = {k: v for k, v in os.environ.items() if not k.startswith("WARMSCALE_")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "service.cli", "up", "--home", str(home), "--json", *options],
            env=environment | {"XDG_CACHE_HOME": str(home / "cache")},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def ready(self):
        line = self.process.stdout.readline()
        assert line, self.process.stderr.read()
        return json.loads(line)

    def family(self):
        return psutil.Process(self.process.pid).children(recursive=True)

    def refused(self):
        """Wait for an end that it comes to by itself."""
        _, said = self.process.communicate(timeout=LONG)
        return self.process.returncode, said

    def end(self, number=signal.SIGINT, seconds=LONG):
        """Send a signal; give the exit code and what was said."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            _, said = self.process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()
            raise
        return self.process.returncode, said


@pytest.fixture(scope="module")
def initialised():
    """A home that was used before: to make a database takes seconds each time."""
    with scratch() as folder:
        one = Up(folder, "--port", "0", "--no-fleet")
        one.ready()
        assert one.end()[0] == 0
        yield folder


@pytest.fixture
def home(home, initialised):
    subprocess.run(["cp", "-a", f"{initialised}/.", home], check=True)
    return home


@pytest.fixture
def up(home):
    with contextlib.ExitStack() as started:

        def start(*options, folder=home):
            one = Up(folder, "--port", "0", *options)
            started.callback(one.end)
            return one

        yield start


@pytest.fixture
def connect(home):
    """A client of a stack that is ready, with the home's key."""
    with contextlib.ExitStack() as opened:

        def open_client(ready):
            key = json.loads((home / "client.json").read_text())["key"]
            headers = {"Authorization": f"Bearer {key}"}
            return opened.enter_context(httpx.Client(base_url=ready["url"], headers=headers))

        yield open_client


def serve_process(one):
    (found,) = [p for p in one.family() if "serve" in p.cmdline()]
    return found


def wait_gone(processes, seconds=LONG):
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    return [p.cmdline() for p in alive]


def cpu_seconds(one):
    """Of the supervisor and its children: whatever else the machine does hardly changes it."""
    times = [p.cpu_times() for p in (psutil.Process(one.process.pid), *one.family())]
    return sum(t.user + t.system for t in times)


def test_it_is_ready_within_8_seconds_of_work_on_an_initialised_home_and_small(up):
    one = up("--no-fleet")
    ready = one.ready()
    assert cpu_seconds(one) < 8
    assert ready["ready_seconds"] < LONG
    assert httpx.get(f"{ready['url']}/readyz").status_code == 200
    assert serve_process(one).memory_info().rss < 300 * 2**20


def test_ctrl_c_ends_everything_and_the_next_start_finds_it_again(up, home, connect):
    one = up("--cpus", "1")
    one.ready()
    wait_for_line(home / "logs" / "fleet.log", "message=ready")
    family = one.family()
    assert len(family) > 3
    code, said = one.end()
    assert (code, wait_gone(family)) == (0, [])
    assert "everything resumes" in said
    assert not [
        p for p in psutil.process_iter(["cmdline"]) if str(home) in (p.info["cmdline"] or [])
    ]
    key = (home / "client.json").read_text()
    client = connect(up("--no-fleet").ready())
    assert client.get("/v1/studies").status_code == 200
    assert json.loads((home / "client.json").read_text())["key"] == json.loads(key)["key"]


def wait_for_line(path, text, seconds=LONG):
    deadline = time.monotonic() + seconds
    while text not in (path.read_text() if path.exists() else ""):
        assert time.monotonic() < deadline, path.read_text()
        time.sleep(0.2)


def test_a_home_in_use_and_a_port_in_use_are_refused_at_once(up, tmp_path):
    one = up("--no-fleet")
    ready = one.ready()
    code, said = up("--no-fleet").refused()
    assert code == 4
    assert f"process {one.process.pid}" in said
    port = ready["url"].rsplit(":", 1)[1]
    code, said = Up(tmp_path, "--no-fleet", "--port", port).refused()
    assert code == 4
    assert f"cannot listen on 127.0.0.1:{port}" in said


def test_an_api_killed_with_9_is_started_again(up):
    one = up("--no-fleet")
    url = one.ready()["url"]
    victim = serve_process(one)
    victim.kill()
    deadline = time.monotonic() + LONG
    while True:
        try:
            if httpx.get(f"{url}/readyz").is_success:
                break
        except httpx.TransportError:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    assert serve_process(one).pid != victim.pid
    code, said = one.end()
    assert code == 0
    assert "the API ended with SIGKILL" in said


def test_a_supervisor_killed_with_9_takes_its_children_along_and_can_start_again(up):
    one = up("--no-fleet")
    one.ready()
    api = serve_process(one)
    one.end(signal.SIGKILL)
    assert wait_gone([api]) == []
    up("--no-fleet").ready()


def test_sigterm_stops_like_ctrl_c(up):
    one = up("--no-fleet")
    one.ready()
    family = one.family()
    assert one.end(signal.SIGTERM)[0] == 0
    assert wait_gone(family) == []


def submit_one_trial(client, study_spec, *, num_steps):
    spec = study_spec(
        target=None,
        train={"batch_size": 8, "num_tokens": 8 * 32 * num_steps, "evaluations": 4},
        hpo={"trials": 1, "sampler": "random", "pruner": "none"},
    )
    return client.post("/v1/studies", json=spec).json()["name"]


def test_what_ctrl_c_interrupted_goes_on_where_it_was(up, connect, study_spec):
    one = up("--cpus", "1")
    client = connect(one.ready())
    name = submit_one_trial(client, study_spec, num_steps=1500)
    before = wait_for_run(client, name, lambda run: run["step"] >= 100)
    assert one.end()[0] == 0
    client = connect(up("--cpus", "1").ready())
    after = wait_for_run(client, name, lambda run: run["state"] == "succeeded")
    assert after["id"] == before["id"]
    assert (after["attempt"], after["failures"]) == (2, 0)
    curve = client.get(f"/v1/runs/{after['id']}/measurements").json()["items"]
    firsts = {
        attempt: min(p["step"] for p in curve if p["attempt"] == attempt) for attempt in (1, 2)
    }
    assert firsts[2] >= 100


def test_a_fleet_that_lost_its_ray_is_started_again_and_the_study_completes(
    up, home, connect, study_spec
):
    one = up("--cpus", "1")
    client = connect(one.ready())
    name = submit_one_trial(client, study_spec, num_steps=5000)
    wait_for_run(client, name, lambda run: run["step"] >= 100)
    (raylet,) = [p for p in one.family() if p.name() == "raylet"]
    raylet.kill()
    after = wait_for_run(client, name, lambda run: run["state"] == "succeeded")
    assert after["failures"] == 1
    assert client.get(f"/v1/studies/{name}").json()["state"] == "completed"
    assert "the fleet ended with exit code 1" in one.end()[1]


def wait_for_run(client, study, condition, seconds=2 * LONG):
    deadline = time.monotonic() + seconds
    while True:
        runs = client.get("/v1/runs", params={"study": study}).json()["items"]
        if runs and condition(runs[0]):
            return runs[0]
        assert time.monotonic() < deadline, runs
        time.sleep(0.1)
