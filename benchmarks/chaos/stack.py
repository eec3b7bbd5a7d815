"""Two replicas of the API on one database, and two fleets that reach them through the proxy."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
from sqlalchemy import Engine, create_engine
from sqlalchemy.orm import Session

from benchmarks.chaos.database import Database
from benchmarks.chaos.disk import Disk
from benchmarks.chaos.proxy import Proxy
from benchmarks.ports import free_port, free_ports
from service.access import keys
from service.local_stack.child_process import die_with_parent

NUM_APIS = 2
NUM_FLEETS = 2
_MOST_RESTARTS = 10
LEASE_SECONDS = 3.0
_GONE_SECONDS = 20.0


class ChaosError(Exception):
    """A process or a study did not end or recover within its time."""


@dataclass(kw_only=True)
class Stack:
    """All processes of the installation; `close` ends each by its id."""

    folder: Path
    fsync: bool
    apis: list[subprocess.Popen[bytes] | None] = field(default_factory=lambda: [None] * NUM_APIS)
    fleets: list[subprocess.Popen[bytes] | None] = field(
        default_factory=lambda: [None] * NUM_FLEETS
    )
    starts: int = 0
    restarts: int = 0
    seen: list[psutil.Process] = field(default_factory=list)

    def open(self) -> None:
        self.disk = Disk(self.folder / "artifacts")
        self.database = Database(self.folder / "db", free_port(), fsync=self.fsync)
        self.engine: Engine = create_engine(
            self.database.url, pool_pre_ping=True, connect_args={"connect_timeout": 2}
        )
        with Session(self.engine) as session, session.begin():
            _, self.key = keys.create_key(session, "chaos", ["admin"])
        self.ports = free_ports(NUM_APIS)
        self.proxy = Proxy(self.ports)
        self.proxy.start()
        self.url = f"http://127.0.0.1:{self.proxy.port}"
        for i in range(NUM_APIS):
            self.start_api(i)
        for i in range(NUM_APIS):
            self.wait_api(i)
        for i in range(NUM_FLEETS):
            self.start_fleet(i)

    def close(self) -> None:
        """End every process that was started, and all processes below them."""
        # Fleets before APIs, and everything by SIGKILL: a graceful end would wait for dead peers.
        roots = [p for p in (*self.fleets, *self.apis) if p is not None]
        families = [
            *filter_running(self.seen),
            *(process for root in roots for process in list_family(root.pid)),
        ]
        for process in families:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        with contextlib.suppress(OSError):  # the process has ended by now
            psutil.wait_procs(families, timeout=_GONE_SECONDS)
        for root in roots:
            with contextlib.suppress(subprocess.TimeoutExpired):
                root.wait(5)
        for part in ("proxy", "database"):
            if hasattr(self, part):
                getattr(self, part).stop()
        if hasattr(self, "engine"):
            self.engine.dispose()
        if hasattr(self, "disk"):
            self.disk.unmount()

    def start_api(self, i: int) -> None:
        self.apis[i] = self._start_process(
            f"api-{i}", "service.cli", "serve", "--port", str(self.ports[i])
        )

    def wait_api(self, i: int, seconds: float = 60.0) -> None:
        deadline = time.monotonic() + seconds
        while not self.is_ready(i):
            self.check_running()
            if time.monotonic() > deadline:
                raise ChaosError(
                    f"replica {i} is not ready within {seconds} s\n{self.read_tail(f'api-{i}')}"
                )
            time.sleep(0.1)

    def is_ready(self, i: int) -> bool:
        with contextlib.suppress(httpx.HTTPError):
            return httpx.get(f"http://127.0.0.1:{self.ports[i]}/readyz", timeout=2).is_success
        return False

    def start_fleet(self, i: int) -> None:
        self.starts += 1
        self.fleets[i] = self._start_process(
            f"fleet-{i}", "service.cli", "fleet", "--url", self.url,
            "--cpus", "1", "--checkpoint-seconds", "0.2", "--name", f"fleet-{i}.{self.starts}",
        )  # fmt: skip

    def find_workers(self, i: int) -> list[psutil.Process]:
        """Return the processes of a fleet that run a task; Ray names a process after its task."""
        root = self.fleets[i]
        processes = [] if root is None else list_family(root.pid)
        return [p for p in processes if "ray::run_lease" in _read_command(p)]

    def _start_process(self, name: str, *module: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", *module],
                env=self._make_environment(),
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=die_with_parent,  # noqa: PLW1509 - a single C call
            )

    def _make_environment(self) -> dict[str, str]:
        ours = {k: v for k, v in os.environ.items() if not k.startswith(("WARMSCALE_", "RAY_"))}
        return ours | {
            "TZ": "UTC",
            "WARMSCALE_DATABASE_URL": self.database.url.render_as_string(hide_password=False),
            "WARMSCALE_HOME": str(self.folder / "home"),
            "WARMSCALE_ARTIFACTS": self.disk.path.as_uri(),
            "WARMSCALE_DATA_ROOTS": str(self.folder / "corpus"),
            "WARMSCALE_LEASE_SECONDS": str(LEASE_SECONDS),
            "WARMSCALE_API_KEY": self.key,
            "XDG_CACHE_HOME": str(self.folder / "cache"),
            "RAY_TMPDIR": str(self.folder),
        }

    def check_running(self) -> None:
        """Raise `ChaosError` if an API has exited, and start a fleet that has exited again.

        A fleet may exit if its Ray does not start or answer. `warmscale up` and compose restart it
        too. The report counts the restarts.
        """
        for i, process in enumerate(self.apis):
            if process is not None and process.poll() is not None:
                raise ChaosError(f"api-{i} exited by itself with {process.returncode}")
        for i, process in enumerate(self.fleets):
            if process is not None and process.poll() is not None:
                self.restarts += 1
                if self.restarts > _MOST_RESTARTS:
                    raise ChaosError(f"fleet-{i} exited by itself with {process.returncode}, again")
                self.start_fleet(i)

    def read_tail(self, name: str, chars: int = 2000) -> str:
        path = self.folder / f"{name}.log"
        return path.read_text(errors="replace")[-chars:] if path.exists() else ""


def list_family(pid: int) -> list[psutil.Process]:
    """Return a process and all processes below it that still exist."""
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    return []


def kill_parent(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Send SIGKILL to the process alone; return the processes below, which must end themselves."""
    below = list_family(process.pid)[1:]
    os.kill(process.pid, signal.SIGKILL)
    process.wait(10)
    return below


def filter_running(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Return the processes that still run; a zombie has no command line."""
    return [p for p in processes if _read_command(p)]


def _read_command(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
        return " ".join(process.cmdline())
    return ""
