"""SIGTERM and Ctrl-C, ignore_signal by a thread of their own.

Python runs a signal's handler in the main thread alone, which Ray's start and end can hold in C++
for as long as a minute, and Ray puts its own handler there, which exits by way of Ray's shutdown.
The wakeup file descriptor is written at once, whatever the main thread does.
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
    """The first signal drains what can be drained; else, and the second time, the process ends.

    Ray's processes die with this one (the kernel tells them), but for agents whose raylet died
    while they started, which live on for a minute. So everything below this process is killed.
    """

    def __init__(self) -> None:
        """Listen from here on. To be made in the main thread."""
        self._drain: Callable[[], None] | None = None
        self._reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        self._install_handlers()
        threading.Thread(target=self._read_signals, name="signals", daemon=True).start()

    def drain_with(self, drain: Callable[[], None]) -> None:
        """Call `drain`, in this object's thread, at the first signal. Again in the main thread."""
        self._drain = drain
        self._install_handlers()  # Ray has put its own there in the meantime

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
            """The thread has it."""

        for number in SIGNALS:
            signal.signal(number, ignore_signal)


def _kill_everything_below() -> None:
    """Stop each before it can start more, and then kill them all."""
    stopped: set[psutil.Process] = set()
    while found := set(psutil.Process().children(recursive=True)) - stopped:
        _send_signal(found, signal.SIGSTOP)
        stopped |= found
    _send_signal(stopped, signal.SIGKILL)


def _send_signal(processes: Iterable[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):  # it has ended
            process.send_signal(number)


def exit_unless_done(seconds: float, code: int) -> threading.Timer:
    """A started timer that ends this process with `code` unless it is cancelled."""
    timer = threading.Timer(seconds, os._exit, (code,))
    timer.daemon = True
    timer.start()
    return timer
