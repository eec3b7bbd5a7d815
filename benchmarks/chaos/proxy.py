"""A proxy between fleets and replicas: it rotates over the replicas, and cuts or delays answers.

The proxy closes the connection after each answer, so that no client stays with the same replica.
"""

import asyncio
import contextlib
import re
import threading
from collections import Counter
from collections.abc import Coroutine
from typing import Any

_CONNECTION = re.compile(rb"\r\nconnection:[^\r\n]*", re.IGNORECASE)
_IDLE_SECONDS = 120.0


class Proxy:
    """A proxy on a free port of 127.0.0.1, with an event loop on a thread of its own."""

    def __init__(self, backends: list[int]) -> None:
        self._backends = backends
        self._next = 0
        self._cuts: list[int] = []
        self.delay_seconds = 0.0
        self.statuses: Counter[str] = Counter()
        self.num_cut = 0
        self.port = 0
        self._loop = asyncio.new_event_loop()
        self._serving: set[asyncio.Task[None]] = set()
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run_loop, name="proxy", daemon=True)

    def start(self) -> None:
        self._thread.start()
        assert self._started.wait(10), "the proxy does not start"

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def cut_answers(self, answers: int, after_bytes: int) -> None:
        """Cut off the next `answers`, each after `after_bytes` bytes."""
        self._cuts += [after_bytes] * answers

    @property
    def refused(self) -> int:
        """The number of writes under a lease that the replicas answered with 409."""
        return sum(n for key, n in self.statuses.items() if key.startswith("/v1/runs 409"))

    def _run_loop(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(
            asyncio.start_server(self._serve_client, "127.0.0.1", 0)
        )
        self.port = server.sockets[0].getsockname()[1]
        self._started.set()
        self._loop.run_forever()
        # If the server were closed first, connections that it has just accepted would stay open.
        self._loop.remove_reader(server.sockets[0].fileno())
        self._loop.run_until_complete(_end_tasks())
        server.close()
        self._loop.close()

    async def _serve_client(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        # asyncio refers to tasks and to streams by weak references only. Once the client has
        # closed, a garbage collection would destroy a task that still waits for the backend.
        task = asyncio.current_task()
        assert task is not None
        self._serving.add(task)
        try:
            await self._relay_request(reader, writer)
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, TimeoutError):
            pass
        except asyncio.CancelledError:
            pass
        finally:
            self._serving.discard(task)
            writer.transport.abort()

    async def _relay_request(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), _IDLE_SECONDS)
        # Ask the replica to close its connection too. The close then marks the end of the answer,
        # and the proxy need not read lengths or chunks.
        head = _CONNECTION.sub(b"", head).replace(b"\r\n", b"\r\nConnection: close\r\n", 1)
        answers, requests = await self._connect_to_any()
        requests.write(head)
        upload = asyncio.ensure_future(_suppress_errors(_copy_stream(reader, requests)))
        try:
            await self._relay_answer(head, answers, writer)
        finally:
            upload.cancel()
            requests.transport.abort()

    async def _relay_answer(
        self, head: bytes, answers: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        first = await answers.read(2**16)
        if not first:
            return
        # /v1/runs/run_1/finish?x with 409 counts under "/v1/runs 409".
        path = "/".join(head.split(b" ", 2)[1].decode().split("?")[0].split("/")[:3])
        self.statuses[f"{path} {first.split(b' ', 2)[1].decode()}"] += 1
        await asyncio.sleep(self.delay_seconds)
        if self._cuts:
            writer.write(first[: self._cuts.pop()])
            self.num_cut += 1
            await writer.drain()
            return
        writer.write(first)
        await _copy_stream(answers, writer)
        writer.close()
        await writer.wait_closed()

    async def _connect_to_any(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Return a connection to the next replica that accepts it."""
        for _ in self._backends[1:]:
            with contextlib.suppress(OSError):
                return await self._connect_to_next()
        return await self._connect_to_next()

    async def _connect_to_next(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        self._next = (self._next + 1) % len(self._backends)
        return await asyncio.open_connection("127.0.0.1", self._backends[self._next])


async def _end_tasks() -> None:
    """End every other task of this loop: each closes its sockets as it ends."""
    while tasks := asyncio.all_tasks() - {asyncio.current_task()}:
        await asyncio.sleep(0)  # a task that is cancelled before it begins runs no `finally`
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
    await asyncio.sleep(0)  # an aborted transport closes its socket in the next turn of the loop


async def _copy_stream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(2**16):
        writer.write(data)
        await writer.drain()


async def _suppress_errors(pumping: Coroutine[Any, Any, None]) -> None:
    with contextlib.suppress(OSError):
        await pumping
