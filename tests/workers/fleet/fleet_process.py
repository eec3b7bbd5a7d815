"""Fleets as a user starts them, each in a process of its own."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path


class FleetProcess:
    """A fleet in a process of its own, with its log file."""

    def __init__(
        self, url: str, log: Path, *options: str, program: Sequence[str] = ("-m", "workers.fleet")
    ) -> None:
        self.log = log
        with log.open("w") as stream:
            self.process = subprocess.Popen(
                [sys.executable, *program, "--url", url, *options],
                env=os.environ | {"WARMSCALE_API_KEY": "key"},
                stdout=stream,
                stderr=stream,
            )

    def wait_until_ready(self, seconds: float = 240.0) -> None:
        deadline = time.monotonic() + seconds
        while "message=ready" not in self.log.read_text():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)

    def signal(self, signum: signal.Signals) -> None:
        self.process.send_signal(signum)

    def descendants(self) -> dict[int, str]:
        """Return the ids and titles of all processes below the fleet."""
        parents, titles = {}, {}
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError):
                pid = int(entry.name)
                parents[pid] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                titles[pid] = (entry / "cmdline").read_text().replace("\0", " ").strip()
        family = {self.process.pid}
        while below := {p for p, parent in parents.items() if parent in family} - family:
            family |= below
        return {pid: titles[pid] for pid in family - {self.process.pid}}

    def worker_pids(self) -> set[int]:
        """Return the ids of the worker processes."""
        below = self.descendants()
        agents = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
        return {p for p, t in below.items() if t.startswith("ray::") and t not in agents}

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
