"""Conditions of a measurement, and the CPU time and memory of processes."""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import optuna

if TYPE_CHECKING:
    from throughput.stack import Stack

_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = 8192  # the page size of PostgreSQL
_SYNCS = 200


def describe_conditions(running: "Stack", arguments: argparse.Namespace) -> dict[str, object]:
    """Return the conditions to print beside the figures; assert that fsync is on."""
    with running.connect("service") as connection:
        version = connection.execute("SHOW server_version").fetchone()
        fsync = connection.execute("SHOW fsync").fetchone()
    assert version is not None
    assert fsync == ("on",)
    low, middle, high = measure_fdatasync(running.data_folder)
    return {
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "postgresql": version[0],
        "optuna": optuna.__version__,
        "fdatasync_ms": {"p5": low, "p50": middle, "p95": high},
        "rounds": arguments.rounds,
        "replicas": arguments.replicas,
        "client": "service.client" if arguments.typed else "http.client",
        "optuna_clients": "threads" if arguments.threads else "processes",
    }


def measure_fdatasync(folder: Path) -> tuple[float, float, float]:
    """Return 5th, 50th and 95th percentile of the ms to overwrite a page and sync it.

    A database writes its log in that way.
    """
    path = folder / "fdatasync"
    file = os.open(path, os.O_RDWR | os.O_CREAT)
    os.pwrite(file, bytes(_PAGE_BYTES * _SYNCS), 0)
    os.fsync(file)
    times = []
    for i in range(_SYNCS):
        os.pwrite(file, os.urandom(_PAGE_BYTES), i * _PAGE_BYTES)
        start = time.perf_counter()
        os.fdatasync(file)
        times.append(1000 * (time.perf_counter() - start))
    os.close(file)
    path.unlink()
    cuts = statistics.quantiles(times, n=20)
    return cuts[0], cuts[9], cuts[18]


def rss_mb(pids: Iterable[int]) -> float:
    """Return the resident memory of all processes together, in MB."""
    pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids)
    return pages * os.sysconf("SC_PAGESIZE") / 1e6


def cpu_seconds(pids: Iterable[int]) -> float:
    """Return the CPU seconds of processes, their living children and their ended children."""
    return sum(_read_times(pid, waited=True) for pid in pids)


def _read_times(pid: int, *, waited: bool) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):  # the process ended before or during the read
        return 0.0
    # Fields 14 to 17 of /proc/PID/stat (proc(5)): user, system, and both of waited-for children.
    own = sum(int(ticks) for ticks in fields[11 : 15 if waited else 13]) / _TICKS
    return own + sum(_read_times(int(child), waited=waited) for child in children)
