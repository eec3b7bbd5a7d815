import signal
import subprocess
import sys
import time

import pytest

from service.local_stack import child_process as children
from service.local_stack.child_process import Child, ChildError, spelled


@pytest.fixture
def child(tmp_path):
    made = []

    def make(script, stop_seconds=30.0):
        one = Child(
            name="thing",
            command=[sys.executable, "-c", script],
            environment={"PYTHONUNBUFFERED": "1"},
            log=tmp_path / "thing.log",
            stop_seconds=stop_seconds,
        )
        made.append(one)
        return one

    yield make
    for one in made:
        one.stop(hurry=lambda: True)


def wait_for(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_child_that_dies_is_started_again_and_its_death_is_said(child, monkeypatch):
    monkeypatch.setattr(children, "_BACKOFF_FIRST_SECONDS", 0.01)
    said = []
    one = child("import time; time.sleep(60)")
    one.start()
    first = one.process.pid
    one.process.kill()
    wait_for(lambda: one.check(said.append) or one.process.pid != first)
    assert one.process.poll() is None
    assert said == ["the thing ended with SIGKILL; starting it again in 0.01 s"]


def test_a_child_that_keeps_dying_is_given_up_with_the_end_of_its_log(child, monkeypatch):
    monkeypatch.setattr(children, "_BACKOFF_FIRST_SECONDS", 0.001)
    one = child("import sys; sys.exit('no such thing')")
    one.start()
    said = []
    with pytest.raises(ChildError, match=r"5 times in a row.*\n(.*\n)*  no such thing"):
        wait_for(lambda: one.check(said.append))
    assert len(said) == 4


def test_the_pauses_double(child, monkeypatch):
    monkeypatch.setattr(children, "_BACKOFF_FIRST_SECONDS", 0.001)
    one = child("raise SystemExit(3)")
    one.start()
    said = []
    with pytest.raises(ChildError):
        wait_for(lambda: one.check(said.append))
    pauses = [float(line.split()[-2]) for line in said]
    assert pauses == [0.001, 0.002, 0.004, 0.008]


def test_stopping_asks_before_it_kills(child):
    listen = "import signal,sys,time; signal.signal(15, lambda *_: sys.exit(7)); "
    one = child(listen + "print('up'); time.sleep(60)")
    one.start()
    wait_for(lambda: "up" in one.log.read_text())
    one.stop(hurry=lambda: False)
    assert one.process.returncode == 7


DEAF = "import signal,time; signal.signal(15, signal.SIG_IGN); print('up'); time.sleep(60)"


def test_a_child_that_does_not_listen_is_killed_in_the_end(child):
    one = child(DEAF, stop_seconds=0.2)
    one.start()
    wait_for(lambda: "up" in one.log.read_text())
    one.stop(hurry=lambda: False)
    assert one.process.returncode == -signal.SIGKILL


def test_in_a_hurry_nothing_is_waited_for(child):
    one = child(DEAF, stop_seconds=60.0)
    one.start()
    wait_for(lambda: "up" in one.log.read_text())
    one.stop(hurry=lambda: True)
    assert one.process.returncode == -signal.SIGKILL


@pytest.fixture
def parent(child):
    """A child with a child of its own that does not listen, and that one's process id."""
    start = f"import subprocess,sys; p=subprocess.Popen([sys.executable,'-c',{DEAF!r}]); "
    one = child(start + "print(p.pid); p.wait()")
    one.start()
    wait_for(lambda: one.log.read_text().count("\n") == 2)
    return one, int(next(x for x in one.log.read_text().split() if x.isdigit()))


def test_nothing_of_a_child_s_session_outlives_it(parent):
    one, grandchild = parent
    one.stop(hurry=lambda: False)
    wait_for(lambda: not _runs(grandchild))


def test_what_a_dead_child_leaves_is_killed_before_it_is_started_again(parent):
    one, grandchild = parent
    one.process.kill()
    said = []
    wait_for(lambda: one.check(said.append) or said)
    wait_for(lambda: not _runs(grandchild))


def _runs(pid):
    state = subprocess.run(
        ["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False
    )
    return state.stdout.strip()[:1] not in ("", "Z")


def test_a_child_stopped_before_it_started_is_no_trouble(child):
    child("pass").stop(hurry=lambda: False)


def test_an_end_is_spelled_as_people_know_it():
    assert spelled(1) == "exit code 1"
    assert spelled(-9) == "SIGKILL"
