"""Free ports for the servers of tests and benchmarks."""

import contextlib
import random
import socket

# Linux gives ports from 32768 on to outgoing connections. Between this choice and the start of the
# server, a connection could take a port of that range. Ray's workers use 10002 to 19999, and Ray
# refuses to start if another part of it is given a port of that range. Avoid both ranges.
_PORTS = range(20_000, 32_000)
_chance = random.SystemRandom()  # Hypothesis seeds `random` alike in every process


def free_port() -> int:
    """Return a port on which no process listens."""
    (port,) = free_ports(1)
    return port


def free_ports(n: int) -> list[int]:
    """Return `n` different ports: each stays bound until all are chosen."""
    ports: list[int] = []
    with contextlib.ExitStack() as held:  # keeps every chosen port bound until the return
        while len(ports) < n:
            with contextlib.suppress(OSError):
                ports.append(_bind_port(held, _chance.choice(_PORTS)))
    return ports


def _bind_port(held: contextlib.ExitStack, port: int) -> int:
    held.enter_context(socket.socket()).bind(("127.0.0.1", port))
    return port
