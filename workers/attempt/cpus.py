"""CPUs of this machine, leased to one run each.

Two runs that float over the same cores slow each other by far more than half: their threads
wait for one another inside every parallel region. A lease is an `flock` on one file per CPU, so
the kernel gives it back when its process ends, however it ends, and fleets share one machine.
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
    """Hold `count` CPUs nobody else holds; None when fewer are free."""
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
    """Run on `max(1, count)` threads, on as many CPUs of our own where possible; gives the number.

    The number of threads never depends on what is free: results are the same bit for bit only at
    equal thread counts. Only the pinning is given up when CPUs are short.
    """
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
    """Whether CPUs can be ours: not on macOS, nor below a container's quota.

    A quota is a share of CPUs that all containers of the machine see and number alike, and our
    locks do not reach into the others: all would pin their first run to CPU 0.
    """
    if not hasattr(os, "sched_setaffinity"):
        return False
    try:
        return _QUOTA.read_text().startswith("max")
    except OSError:
        return True


def _move_all_threads(cpus: frozenset[int]) -> None:
    # All of them: torch's pool outlives a run and keeps the CPUs that it was created on.
    for thread in Path("/proc/self/task").iterdir():
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(int(thread.name), cpus)
