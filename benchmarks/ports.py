"""Ports to serve on, for tests and benchmarks."""

import contextlib
import random
import socket

# Below those that the kernel gives to outgoing connections (from 32768 on Linux): one of those
# could go to somebody's connection before the server that it is meant for has it. Ray's workers
# have 10002 to 19999, and a Ray refuses to start that is given one of these for another part.
_PORTS = range(20_000, 32_000)
_chance = random.SystemRandom()  # Hypothesis seeds the other, in every process alike


def free_port() -> int:
    """One that nobody listens on."""
    (port,) = free_ports(1)
    return port


def free_ports(n: int) -> list[int]:
    """Different ones: each is held until all are known."""
    found: list[int] = []
    with contextlib.ExitStack() as held:
        while len(found) < n:
            with contextlib.suppress(OSError):
                found.append(_held(held, _chance.choice(_PORTS)))
    return found


def _held(held: contextlib.ExitStack, port: int) -> int:
    held.enter_context(socket.socket()).bind(("127.0.0.1", port))
    return port
