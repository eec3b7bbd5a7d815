import signal
import subprocess
import sys
import time

import pytest

from service.local_stack import child_process as children
from service.local_stack.child_process import Child, ChildError, format_exit


@pytest.fixture
def child(tmp_path):
    made = []

    def make(script, stop_seconds=30.0):
        made_child = Child(
            name="thing",
            command=[sys.executable, "-c", script],
            environment={"PYTHONUNBUFFERED": "1"},
            log=tmp_path / "thing.log",
            stop_seconds=stop_seconds,
        )
        made.append(made_child)
        return made_child

    yield make
    for made_child in made:
        made_child.stop(hurry=lambda: True)


def wait_for(condition, seconds=10.0):
    """Fail unless `condition` becomes true within `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_child_that_dies_is_started_again_and_its_death_is_said(child, monkeypatch):
    monkeypatch.setattr(children, "_BACKOFF_FIRST_SECONDS", 0.01)
    messages = []
    thing = child("import time; time.sleep(60)")
    thing.start()
    first = thing.process.pid
    thing.process.kill()
    wait_for(lambda: thing.restart_if_exited(messages.append) or thing.process.pid != first)
    assert thing.process.poll() is None
    assert messages == ["the thing ended with SIGKILL; starting it again in 0.01 s"]


def test_a_child_that_keeps_dying_is_given_up_with_the_end_of_its_log(child, monkeypatch):
    monkeypatch.setattr(children, "_BACKOFF_FIRST_SECONDS", 0.001)
    thing = child("import sys; sys.exit('no such thing')")
    thing.start()
    messages = []
    with pytest.raises(ChildError, match=r"5 times in a row.*\n(.*\n)*  no such thing"):
        wait_for(lambda: thing.restart_if_exited(messages.append))
    # Four restarts, and the fifth exit raises.
    assert len(messages) == 4


def test_the_pauses_double(child, monkeypatch):
    monkeypatch.setattr(children, "_BACKOFF_FIRST_SECONDS", 0.001)
    thing = child("raise SystemExit(3)")
    thing.start()
    messages = []
    with pytest.raises(ChildError):
        wait_for(lambda: thing.restart_if_exited(messages.append))
    pauses = [float(line.split()[-2]) for line in messages]
    assert pauses == [0.001, 0.002, 0.004, 0.008]


def test_stopping_asks_before_it_kills(child):
    listen = "import signal,sys,time; signal.signal(15, lambda *_: sys.exit(7)); "
    thing = child(listen + "print('up'); time.sleep(60)")
    thing.start()
    wait_for(lambda: "up" in thing.log.read_text())
    thing.stop(hurry=lambda: False)
    assert thing.process.returncode == 7


# A program that ignores SIGTERM.
DEAF = "import signal,time; signal.signal(15, signal.SIG_IGN); print('up'); time.sleep(60)"


def test_a_child_that_does_not_listen_is_killed_in_the_end(child):
    thing = child(DEAF, stop_seconds=0.2)
    thing.start()
    wait_for(lambda: "up" in thing.log.read_text())
    thing.stop(hurry=lambda: False)
    assert thing.process.returncode == -signal.SIGKILL


def test_in_a_hurry_nothing_is_waited_for(child):
    thing = child(DEAF, stop_seconds=60.0)
    thing.start()
    wait_for(lambda: "up" in thing.log.read_text())
    thing.stop(hurry=lambda: True)
    assert thing.process.returncode == -signal.SIGKILL


@pytest.fixture
def parent(child):
    """Return a child that has started a child, and that grandchild's process id."""
    start = f"import subprocess,sys; p=subprocess.Popen([sys.executable,'-c',{DEAF!r}]); "
    thing = child(start + "print(p.pid); p.wait()")
    thing.start()
    wait_for(lambda: thing.log.read_text().count("\n") == 2)
    return thing, int(next(x for x in thing.log.read_text().split() if x.isdigit()))


def test_nothing_of_a_child_s_session_outlives_it(parent):
    thing, grandchild = parent
    thing.stop(hurry=lambda: False)
    wait_for(lambda: not is_running(grandchild))


def test_what_a_dead_child_leaves_is_killed_before_it_is_started_again(parent):
    thing, grandchild = parent
    # The kill leaves the grandchild in the session.
    thing.process.kill()
    messages = []
    wait_for(lambda: thing.restart_if_exited(messages.append) or messages)
    wait_for(lambda: not is_running(grandchild))


def is_running(pid):
    # A zombie (state Z) has ended, but its parent has not read its exit code yet.
    state = subprocess.run(
        ["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False
    )
    return state.stdout.strip()[:1] not in ("", "Z")


def test_a_child_stopped_before_it_started_is_no_trouble(child):
    child("pass").stop(hurry=lambda: False)


def test_an_end_is_spelled_as_people_know_it():
    assert format_exit(1) == "exit code 1"
    assert format_exit(-9) == "SIGKILL"
