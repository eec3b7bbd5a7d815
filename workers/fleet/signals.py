"""SIGTERM and Ctrl-C, handled by a thread of their own.

Python runs signal handlers in the main thread only. Ray's start and shutdown can keep that thread
in C++ for a minute. Ray also installs a handler of its own, which exits through Ray's shutdown. The
wakeup file descriptor is written at once, even when the main thread is busy.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterable
from types import FrameType

import psutil

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stop:
    """Handler of the stop signals: the first drains, if the fleet can; the next ends the process.

    The kernel ends most of Ray's processes together with this process. Agents whose raylet died
    during their start live on for a minute, so every process below this process is killed.
    """

    def __init__(self) -> None:
        """Start to handle signals; must run in the main thread."""
        self._drain: Callable[[], None] | None = None
        self._reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        self._install_handlers()
        threading.Thread(target=self._read_signals, name="signals", daemon=True).start()

    def drain_with(self, drain: Callable[[], None]) -> None:
        """Call `drain`, in this object's thread, at the first signal.

        This method itself must run in the main thread.
        """
        self._drain = drain
        self._install_handlers()  # Ray has installed a handler of its own since `__init__`

    def _read_signals(self) -> None:
        while True:
            for number in os.read(self._reader, 64):
                if number in SIGNALS:
                    self._handle_signal(number)

    def _handle_signal(self, number: int) -> None:
        drain, self._drain = self._drain, None
        if drain is None:
            try:
                _kill_everything_below()
            finally:
                os._exit(128 + number)
        drain()

    def _install_handlers(self) -> None:
        def ignore_signal(_number: int, _frame: FrameType | None) -> None:
            """Do nothing: the thread reads the signal from the file descriptor."""

        for number in SIGNALS:
            signal.signal(number, ignore_signal)


def _kill_everything_below() -> None:
    """Kill every process below this process."""
    # First stop them all, again and again until a pass finds no new process: a killed parent could
    # otherwise have started a child between the listing and the kill.
    stopped: set[psutil.Process] = set()
    while found := set(psutil.Process().children(recursive=True)) - stopped:
        _send_signal(found, signal.SIGSTOP)
        stopped |= found
    _send_signal(stopped, signal.SIGKILL)


def _send_signal(processes: Iterable[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):  # the process has ended
            process.send_signal(number)


def exit_unless_done(seconds: float, code: int) -> threading.Timer:
    """Start and return a timer that ends this process with `code` unless it is cancelled."""
    timer = threading.Timer(seconds, os._exit, (code,))
    timer.daemon = True
    timer.start()
    return timer
