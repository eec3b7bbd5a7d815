"""CPUs of this machine, each leased to a single run.

Two runs that share cores slow each other by far more than half: the threads of each wait for one
another in every parallel region. A lease is an `flock` on a file per CPU. The kernel releases the
lock when the process ends, even by SIGKILL, so several fleets can share a machine.
"""

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Generator
from pathlib import Path

import torch

_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def _lock_folder() -> Path:
    """Return the folder of this user's locks."""
    return Path(tempfile.gettempdir()) / f"warmscale-cpus-{os.getuid()}"


@contextlib.contextmanager
def lease_cpus(count: int, *, folder: Path | None = None) -> Generator[frozenset[int] | None]:
    """Yield `count` CPUs that no other process holds; None when fewer are free."""
    folder = folder or _lock_folder()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with contextlib.ExitStack() as locks:
        held: set[int] = set()
        for cpu in sorted(os.sched_getaffinity(0)):
            if len(held) == count:
                break
            descriptor = _try_lock(folder / str(cpu))
            if descriptor is not None:
                locks.callback(os.close, descriptor)
                held.add(cpu)
        # Too few: release them at once, since a smaller run may be able to use them.
        if len(held) < count:
            locks.close()
        yield frozenset(held) if held and len(held) == count else None


def _try_lock(path: Path) -> int | None:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


@contextlib.contextmanager
def pin_threads(count: int, *, folder: Path | None = None) -> Generator[int]:
    """Run on `max(1, count)` threads, pinned to as many leased CPUs; yield the number of threads.

    The number of threads never depends on the free CPUs: results are bit for bit the same only at
    equal thread counts. When CPUs are short, the threads run unpinned.
    """
    # Example: 4 CPUs, two runs of 2 and a third of 2. The first pins its threads to CPUs 0 and 1,
    # the second to 2 and 3. The third finds no lock free and floats over all four, with 2 threads.
    # It is slower, but its losses are the same as on an idle machine.
    num_threads = max(1, count)
    with contextlib.ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(num_threads)
        cpus = stack.enter_context(lease_cpus(count, folder=folder)) if _may_pin() else None
        if cpus is not None:
            stack.callback(_move_all_threads, frozenset(os.sched_getaffinity(0)))
            _move_all_threads(cpus)
        yield num_threads


def _may_pin() -> bool:
    """Return whether CPUs can be leased: not on macOS, and not under a container's CPU quota.

    A quota limits time on CPUs that all containers of the machine see under the same numbers. Our
    lock files are private to a container, so every container would pin a first run to CPU 0.
    """
    # cpu.max holds "max 100000" without a quota, and "200000 100000" for a quota of 2 CPUs.
    if not hasattr(os, "sched_setaffinity"):
        return False
    try:
        return _QUOTA.read_text().startswith("max")
    except OSError:
        return True


def _move_all_threads(cpus: frozenset[int]) -> None:
    # Move every thread, not only the calling thread: torch's pool outlives a run, and its threads
    # keep the CPUs of the run that created them.
    for thread in Path("/proc/self/task").iterdir():
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(int(thread.name), cpus)
