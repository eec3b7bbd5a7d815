"""The end of an API process: it grants no leases, answers waiting calls, finishes the others."""

import asyncio
import contextlib
import signal
import socket
from collections.abc import Coroutine
from types import FrameType
from typing import Any

import uvicorn


class Shutdown:
    """A flag that this process is shutting down. It is set once and never cleared."""

    def __init__(self) -> None:
        self._begun = asyncio.Event()

    @property
    def begun(self) -> bool:
        """True once the shutdown has begun: grant no further lease, and wait for nothing."""
        return self._begun.is_set()

    def begin(self) -> None:
        """Set the flag and wake every waiting call. On the event loop's thread only."""
        self._begun.set()

    async def pause(self, seconds: float) -> None:
        """Sleep, but at most until the shutdown begins."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._begun.wait()

    async def cut_short(self, wait: Coroutine[Any, Any, object]) -> None:
        """Wait for a coroutine, but at most until the shutdown begins; then cancel it.

        Raises the coroutine's exception. Returns after the coroutine has ended, cancelled or not.
        """
        # `asyncio.wait` cancels nothing itself: cancel the wait that did not end.
        waits = [asyncio.create_task(wait), asyncio.create_task(self._begun.wait())]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waits:
                task.cancel()
            await asyncio.wait(waits)
        if not waits[0].cancelled():
            waits[0].result()


class Server(uvicorn.Server):
    """uvicorn, but it begins our shutdown before it waits for the requests in progress.

    Otherwise long-polls and event streams would run until uvicorn's timeout cuts them off.
    """

    def __init__(self, config: uvicorn.Config, shutdown: Shutdown) -> None:
        super().__init__(config)
        self._service_shutdown = shutdown

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin our shutdown, refuse new connections, finish the requests in progress."""
        self._service_shutdown.begin()
        await super().shutdown(sockets)


def end_on_sigterm() -> None:
    """Make SIGTERM end this process with exit code 0, after every `finally` has run.

    uvicorn handles the signal while it serves, and sends it again when it has stopped. By default
    the second signal would end the process at once, with code 143.
    """

    def end(_number: int, _frame: FrameType | None) -> None:
        raise SystemExit(0)

    signal.signal(signal.SIGTERM, end)
