"""Shutting down: what waits is answered at once, what runs is finished, nothing more is granted."""

import asyncio
import contextlib
import signal
import socket
from collections.abc import Coroutine
from types import FrameType
from typing import Any

import uvicorn


class Shutdown:
    """Whether this process is on its way out. Begun once, never undone."""

    def __init__(self) -> None:
        self._begun = asyncio.Event()

    @property
    def begun(self) -> bool:
        """Whether to grant and to wait for nothing more."""
        return self._begun.is_set()

    def begin(self) -> None:
        """Wake everything that pauses. On the event loop's thread."""
        self._begun.set()

    async def pause(self, seconds: float) -> None:
        """Sleep, but not past the beginning of the end."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._begun.wait()

    async def cut_short(self, wait: Coroutine[Any, Any, object]) -> None:
        """Wait for this, but not past the beginning of the end."""
        waits = [asyncio.create_task(wait), asyncio.create_task(self._begun.wait())]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waits:
                task.cancel()


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
    """Have SIGTERM end this process with 0, by way of every `finally`.

    uvicorn catches it while it serves, and raises it again once it has stopped.
    """

    def end(_number: int, _frame: FrameType | None) -> None:
        raise SystemExit(0)

    signal.signal(signal.SIGTERM, end)
