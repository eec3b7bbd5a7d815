import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from workers.attempt import cpus

_HOLD = """
import sys, time
from pathlib import Path
from workers.attempt import cpus
with cpus.lease_cpus(1, folder=Path(sys.argv[1])) as held:
    print(min(held), flush=True)
    time.sleep(60)
"""


@pytest.fixture
def available() -> frozenset[int]:
    return frozenset(os.sched_getaffinity(0))


def test_no_cpu_is_leased_twice(tmp_path: Path, available: frozenset[int]) -> None:
    with cpus.lease_cpus(1, folder=tmp_path) as first:
        rest = len(available) - 1
        with cpus.lease_cpus(rest, folder=tmp_path) as others:
            assert (others or frozenset()) | first == available
            assert first.isdisjoint(others or ())
            with cpus.lease_cpus(1, folder=tmp_path) as none_left:
                assert none_left is None


def test_too_few_free_cpus_lease_none_and_keep_none(
    tmp_path: Path, available: frozenset[int]
) -> None:
    with cpus.lease_cpus(len(available) + 1, folder=tmp_path) as held:
        assert held is None
        with cpus.lease_cpus(len(available), folder=tmp_path) as all_of_them:
            assert all_of_them == available


def test_kill_9_frees_the_cpus_of_a_process(tmp_path: Path, available: frozenset[int]) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as holder:
        taken = int(holder.stdout.readline())
        with cpus.lease_cpus(len(available), folder=tmp_path) as held:
            assert held is None
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
    with cpus.lease_cpus(len(available), folder=tmp_path) as held:
        assert taken in held


def test_pinning_moves_every_thread_and_is_undone(
    tmp_path: Path, available: frozenset[int]
) -> None:
    stop = threading.Event()
    other = threading.Thread(target=stop.wait)
    other.start()
    # A second thread stands for torch's pool, which outlives a run.
    threads_before = torch.get_num_threads()
    with cpus.pin_threads(1, folder=tmp_path) as num_threads:
        assert num_threads == torch.get_num_threads() == 1
        assert len(os.sched_getaffinity(0)) == 1
        assert os.sched_getaffinity(other.native_id) == os.sched_getaffinity(0)
    assert os.sched_getaffinity(other.native_id) == os.sched_getaffinity(0) == available
    assert torch.get_num_threads() == threads_before
    stop.set()
    other.join()


def test_the_number_of_threads_does_not_depend_on_what_is_free(
    tmp_path: Path, available: frozenset[int]
) -> None:
    with (
        cpus.lease_cpus(len(available), folder=tmp_path),
        cpus.pin_threads(2, folder=tmp_path) as threads,
    ):
        assert threads == 2
        assert os.sched_getaffinity(0) == available


def test_a_run_without_cpus_of_its_own_has_one_thread(tmp_path: Path) -> None:
    with cpus.pin_threads(0, folder=tmp_path) as num_threads:
        assert num_threads == 1
