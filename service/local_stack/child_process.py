"""A supervised process, restarted after an exit; the supervisor gives up after five quick exits."""

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

_QUICK_EXIT_SECONDS = 60.0
_MAX_QUICK_EXITS = 5
_BACKOFF_FIRST_SECONDS = 0.5
_POLL_SECONDS = 0.05
_LOG_TAIL_LINES = 12
_PR_SET_PDEATHSIG = 1  # from <linux/prctl.h>


class ChildError(Exception):
    """A child process that exits again and again soon after its start."""


@dataclass(kw_only=True)
class Child:
    """One command that runs in its own session and writes its output to a log file."""

    name: str
    command: list[str]
    environment: dict[str, str]
    log: Path
    stop_seconds: float
    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    quick_exits: int = 0
    restart_at: float | None = None

    def start(self) -> None:
        """Start the process and append its output to the log."""
        # In its own session the child gets no SIGINT from the terminal: Ctrl-C reaches the
        # supervisor alone, and the supervisor then stops the children in order.
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

    def restart_if_exited(self, notify: Callable[[str], None]) -> None:
        """Restart the process if it has exited, after a pause that doubles with each quick exit.

        Returns at once: call it several times a second, and a later call does the restart.

        Raises:
            ChildError: the process has exited five times in a row within a minute of its start.
        """
        if self.restart_at is not None:
            if time.monotonic() >= self.restart_at:
                self.start()
            return
        code = None if self.process is None else self.process.poll()
        if code is not None:
            self._schedule_restart(code, notify)

    def _schedule_restart(self, code: int, notify: Callable[[str], None]) -> None:
        # Example: a port that is taken makes the API exit at once. It restarts after 0.5, 1, 2 and
        # 4 s, and the fifth quick exit raises ChildError with the end of the log. An API that exits
        # after an hour counts as the first quick exit again: it restarts after 0.5 s.
        self._kill_session()
        now = time.monotonic()
        quick = now - self.started_at < _QUICK_EXIT_SECONDS
        self.quick_exits = self.quick_exits + 1 if quick else 1
        how = format_exit(code)
        if self.quick_exits >= _MAX_QUICK_EXITS:
            times = f"{self.quick_exits} times in a row"
            raise ChildError(f"the {self.name} ended {times}, last with {how}\n{self.read_tail()}")
        pause = _BACKOFF_FIRST_SECONDS * 2 ** (self.quick_exits - 1)
        self.restart_at = now + pause
        notify(f"the {self.name} ended with {how}; starting it again in {pause:g} s")

    def read_tail(self) -> str:
        """Return the last 12 lines of the log, indented, and the path of the log."""
        lines = self.log.read_text(errors="replace").splitlines()[-_LOG_TAIL_LINES:]
        return "\n".join([*(f"  {line}" for line in lines), f"  (the whole log: {self.log})"])

    def stop(self, *, hurry: Callable[[], bool]) -> None:
        """Send SIGTERM, wait up to `stop_seconds`, then kill every process left in the session.

        The wait ends early when `hurry` returns True.
        """
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
        # The session's id is the child's process id. The child's own children are in the session
        # too: a fleet's Ray processes would otherwise outlive a fleet that was killed.
        with contextlib.suppress(ProcessLookupError):  # every process of the session has exited
            os.killpg(self.process.pid, signal.SIGKILL)


def format_exit(code: int) -> str:
    """Return how a process ended: `exit code 1`, or `SIGKILL` for code -9."""
    return f"exit code {code}" if code >= 0 else signal.Signals(-code).name


def die_with_parent() -> None:
    """Ask the kernel to send this process SIGTERM when its parent ends (Linux only)."""
    # A supervisor that gets kill -9 cannot stop its children: without this call they would keep
    # the port and the database, and the next `warmscale up` would fail. The kernel keeps the
    # request per process (prctl(2), PR_SET_PDEATHSIG) and sends SIGTERM even after a kill -9.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
