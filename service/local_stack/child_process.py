"""A process that is watched: started again when it dies, given up when it keeps dying."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_QUICK_DEATH_SECONDS = 60.0
_MAX_QUICK_DEATHS = 5
_BACKOFF_FIRST_SECONDS = 0.5
_POLL_SECONDS = 0.05
_LOG_TAIL_LINES = 12
_PR_SET_PDEATHSIG = 1


class ChildError(Exception):
    """A child keeps dying."""


@dataclass(kw_only=True)
class Child:
    """One command, run in a session of its own with its output in a log."""

    name: str
    command: list[str]
    environment: dict[str, str]
    log: Path
    stop_seconds: float
    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    quick_deaths: int = 0
    restart_at: float | None = None

    def start(self) -> None:
        """Start it, its output appended to its log."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(  # noqa: S603 - our own command
                self.command,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.started_at, self.restart_at = time.monotonic(), None

    def check(self, say: Callable[[str], None]) -> None:
        """Start it again if it died, after a pause that doubles with each quick death.

        Raises:
            ChildError: it keeps dying.
        """
        if self.restart_at is not None:
            if time.monotonic() >= self.restart_at:
                self.start()
            return
        code = None if self.process is None else self.process.poll()
        if code is not None:
            self._died(code, say)

    def _died(self, code: int, say: Callable[[str], None]) -> None:
        self._kill_session()
        now = time.monotonic()
        quick = now - self.started_at < _QUICK_DEATH_SECONDS
        self.quick_deaths = self.quick_deaths + 1 if quick else 1
        how = spelled(code)
        if self.quick_deaths >= _MAX_QUICK_DEATHS:
            times = f"{self.quick_deaths} times in a row"
            raise ChildError(f"the {self.name} ended {times}, last with {how}\n{self.tail()}")
        pause = _BACKOFF_FIRST_SECONDS * 2 ** (self.quick_deaths - 1)
        self.restart_at = now + pause
        say(f"the {self.name} ended with {how}; starting it again in {pause:g} s")

    def tail(self) -> str:
        """The last lines of its log."""
        lines = self.log.read_text(errors="replace").splitlines()[-_LOG_TAIL_LINES:]
        return "\n".join([*(f"  {line}" for line in lines), f"  (all of it in {self.log})"])

    def stop(self, *, hurry: Callable[[], bool]) -> None:
        """Ask it to end, wait while there is no hurry, and kill what is left of its session."""
        if self.process is None:
            return
        if self.process.poll() is None:
            self.process.terminate()
        deadline = time.monotonic() + self.stop_seconds
        while self.process.poll() is None and time.monotonic() < deadline and not hurry():
            time.sleep(_POLL_SECONDS)
        self._kill_session()
        self.process.wait()

    def _kill_session(self) -> None:
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):  # all of it has ended by itself
            os.killpg(self.process.pid, signal.SIGKILL)


def spelled(code: int) -> str:
    """How a process ended: `exit code 1`, `SIGKILL`."""
    return f"exit code {code}" if code >= 0 else signal.Signals(-code).name


def die_with_parent() -> None:
    """Have this process told to stop when its parent is gone, even by kill -9 (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
