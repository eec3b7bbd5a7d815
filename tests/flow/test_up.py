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

from tests.conftest import make_scratch_folder

pytestmark = pytest.mark.timeout(900)  # seconds, on a busy machine
LONG = 90  # long enough for a busy machine


class Up:
    """A supervisor process, and everything that it started."""

    def __init__(self, home, *options):
        environment = {k: v for k, v in os.environ.items() if not k.startswith("WARMSCALE_")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "service.cli", "up", "--home", str(home), "--json", *options],
            env=environment | {"XDG_CACHE_HOME": str(home / "cache")},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_ready(self):
        line = self.process.stdout.readline()
        assert line, self.process.stderr.read()
        return json.loads(line)

    def family(self):
        return psutil.Process(self.process.pid).children(recursive=True)

    def wait_refused(self):
        """Wait until the supervisor exits by itself."""
        _, output = self.process.communicate(timeout=LONG)
        return self.process.returncode, output

    def end(self, number=signal.SIGINT, seconds=LONG):
        """Send a signal; return the exit code and the output."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            _, output = self.process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()
            raise
        return self.process.returncode, output


@pytest.fixture(scope="module")
def initialised():
    """A home with an existing database, because making a database takes seconds."""
    with make_scratch_folder() as folder:
        stack = Up(folder, "--port", "0", "--no-fleet")
        stack.wait_ready()
        assert stack.end()[0] == 0
        yield folder


@pytest.fixture
def home(home, initialised):
    subprocess.run(["cp", "-a", f"{initialised}/.", home], check=True)
    return home


@pytest.fixture
def up(home):
    with contextlib.ExitStack() as started:

        def start(*options, folder=home):
            stack = Up(folder, "--port", "0", *options)
            started.callback(stack.end)
            return stack

        yield start


@pytest.fixture
def connect(home):
    """Return a client of a ready stack, with the key of its home."""
    with contextlib.ExitStack() as opened:

        def open_client(ready):
            key = json.loads((home / "client.json").read_text())["key"]
            headers = {"Authorization": f"Bearer {key}"}
            client = httpx.Client(base_url=ready["url"], headers=headers, timeout=LONG)
            return opened.enter_context(client)

        yield open_client


def find_serve_process(stack):
    (serving,) = [p for p in stack.family() if "serve" in ask_process(p.cmdline, default=[])]
    return serving


def ask_process(method, *, default):
    """Call a method of a process; return `default` if the process has ended since it was listed."""
    try:
        return method()
    except psutil.Error:
        return default


def wait_until_gone(processes, seconds=LONG):
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    return [ask_process(p.cmdline, default=[]) for p in alive]


def cpu_seconds(stack):
    """Return the CPU seconds of the supervisor and its children, without other load."""
    times = [p.cpu_times() for p in (psutil.Process(stack.process.pid), *stack.family())]
    return sum(t.user + t.system for t in times)


def test_it_is_ready_within_8_seconds_of_work_on_an_initialised_home_and_small(up):
    stack = up("--no-fleet")
    ready = stack.wait_ready()
    assert cpu_seconds(stack) < 8
    assert ready["ready_seconds"] < LONG
    assert httpx.get(f"{ready['url']}/readyz").status_code == 200
    assert find_serve_process(stack).memory_info().rss < 300 * 2**20


def test_ctrl_c_ends_everything_and_the_next_start_finds_it_again(up, home, connect):
    stack = up("--cpus", "1")
    stack.wait_ready()
    wait_for_line(home / "logs" / "fleet.log", "message=ready")
    family = stack.family()
    assert len(family) > 3
    code, output = stack.end()
    assert (code, wait_until_gone(family)) == (0, [])
    assert "everything resumes" in output
    assert not [
        p for p in psutil.process_iter(["cmdline"]) if str(home) in (p.info["cmdline"] or [])
    ]
    key = (home / "client.json").read_text()
    client = connect(up("--no-fleet").wait_ready())
    assert client.get("/v1/studies").status_code == 200
    assert json.loads((home / "client.json").read_text())["key"] == json.loads(key)["key"]


def wait_for_line(path, text, seconds=LONG):
    deadline = time.monotonic() + seconds
    while text not in (path.read_text() if path.exists() else ""):
        assert time.monotonic() < deadline, path.read_text()
        time.sleep(0.2)


def test_a_home_in_use_and_a_port_in_use_are_refused_at_once(up, tmp_path):
    stack = up("--no-fleet")
    ready = stack.wait_ready()
    code, output = up("--no-fleet").wait_refused()
    assert code == 4
    assert f"process {stack.process.pid}" in output
    port = ready["url"].rsplit(":", 1)[1]
    code, output = Up(tmp_path, "--no-fleet", "--port", port).wait_refused()
    assert code == 4
    assert f"cannot listen on 127.0.0.1:{port}" in output


def test_an_api_killed_with_9_is_started_again(up):
    stack = up("--no-fleet")
    url = stack.wait_ready()["url"]
    victim = find_serve_process(stack)
    victim.kill()
    # The supervisor waits 0.5 s before it starts the API again.
    deadline = time.monotonic() + LONG
    while True:
        try:
            if httpx.get(f"{url}/readyz").is_success:
                break
        except httpx.TransportError:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    assert find_serve_process(stack).pid != victim.pid
    code, output = stack.end()
    assert code == 0
    assert "the API ended with SIGKILL" in output


def test_a_supervisor_killed_with_9_takes_its_children_along_and_can_start_again(up):
    stack = up("--no-fleet")
    stack.wait_ready()
    api = find_serve_process(stack)
    stack.end(signal.SIGKILL)
    assert wait_until_gone([api]) == []
    up("--no-fleet").wait_ready()


def test_sigterm_stops_like_ctrl_c(up):
    stack = up("--no-fleet")
    stack.wait_ready()
    family = stack.family()
    assert stack.end(signal.SIGTERM)[0] == 0
    assert wait_until_gone(family) == []


def submit_one_trial(client, study_spec, *, num_steps):
    spec = study_spec(
        target=None,
        train={"batch_size": 8, "num_tokens": 8 * 32 * num_steps, "evaluations": 4},
        hpo={"trials": 1, "sampler": "random", "pruner": "none"},
    )
    return client.post("/v1/studies", json=spec).json()["name"]


def test_what_ctrl_c_interrupted_goes_on_where_it_was(up, connect, study_spec):
    stack = up("--cpus", "1")
    client = connect(stack.wait_ready())
    name = submit_one_trial(client, study_spec, num_steps=1500)
    before = wait_for_run(client, name, lambda run: run["step"] >= 100)
    assert stack.end()[0] == 0
    client = connect(up("--cpus", "1").wait_ready())
    after = wait_for_run(client, name, lambda run: run["state"] == "succeeded")
    assert after["id"] == before["id"]
    assert (after["attempt"], after["failures"]) == (2, 0)
    curve = client.get(f"/v1/runs/{after['id']}/measurements").json()["items"]
    # The second attempt goes on after the checkpoint of the drain, at step 100 or later.
    firsts = {
        attempt: min(p["step"] for p in curve if p["attempt"] == attempt) for attempt in (1, 2)
    }
    assert firsts[2] >= 100


def test_a_fleet_that_lost_its_ray_is_started_again_and_the_study_completes(
    up, home, connect, study_spec
):
    stack = up("--cpus", "1")
    client = connect(stack.wait_ready())
    name = submit_one_trial(client, study_spec, num_steps=5000)
    wait_for_run(client, name, lambda run: run["step"] >= 100)
    (raylet,) = [p for p in stack.family() if ask_process(p.name, default="") == "raylet"]
    raylet.kill()
    after = wait_for_run(client, name, lambda run: run["state"] == "succeeded")
    assert after["failures"] == 1
    assert client.get(f"/v1/studies/{name}").json()["state"] == "completed"
    assert "the fleet ended with exit code 1" in stack.end()[1]


def wait_for_run(client, study, condition, seconds=2 * LONG):
    deadline = time.monotonic() + seconds
    while True:
        runs = client.get("/v1/runs", params={"study": study}).json()["items"]
        if runs and condition(runs[0]):
            return runs[0]
        assert time.monotonic() < deadline, runs
        time.sleep(0.1)
