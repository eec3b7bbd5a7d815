"""Cost of waiting workers, and the time until they get a lease.

200 workers wait at `POST /v1/leases` of a `warmscale serve`, each on a connection of its own. First
the script measures the CPU of API and PostgreSQL and the connections to the database while nothing
happens. Then it creates studies of a single trial, and measures the time from the answer to the
first lease. At last it creates a study with a trial for every worker, and measures the time until
each worker has a lease.

    python benchmarks/idle_workers.py [--workers 200] [--seconds 20] [--studies 10]

The script ends within two minutes, and connects to 127.0.0.1 only.
"""

import argparse
import asyncio
import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from throughput import machine
from throughput.stack import Stack, run_stack

WAIT_SECONDS = 20.0
SETTLE_SECONDS = 3.0
TRIAL = {"lr": {"type": "float", "low": 5e-4, "high": 3e-2, "log": True}}


@dataclass
class Crowd:
    """Waiting workers, and a queue of their leases as (time, study)."""

    port: int
    key: str
    granted: asyncio.Queue[tuple[float, str]] = field(default_factory=asyncio.Queue)
    polls: int = 0

    async def run_worker(self, name: str) -> None:
        body = {"worker": name, "resources": {"cpus": 1}, "wait_seconds": WAIT_SECONDS}
        async with open_link(self.port) as link:
            while True:
                reply = await send_request(*link, self.key, "/v1/leases", body)
                self.polls += 1
                for lease in reply["leases"]:
                    self.granted.put_nowait((time.perf_counter(), lease["study_name"]))


@contextlib.asynccontextmanager
async def open_link(port: int) -> AsyncGenerator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Open a connection, and close it even if a request on it fails."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def send_request(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, key: str, path: str, body: Any
) -> Any:
    """Send a request on an open connection and return the JSON of the answer."""
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: here\r\nAuthorization: Bearer {key}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    writer.write(head.encode() + data)
    answer = await reader.readuntil(b"\r\n\r\n")
    # The first line is the status, and the last two are empty.
    fields = dict(line.split(b": ", 1) for line in answer.split(b"\r\n")[1:-2])
    length = {name.lower(): value for name, value in fields.items()}[b"content-length"]
    content = await reader.readexactly(int(length))
    assert answer.split()[1].startswith(b"2"), content
    return json.loads(content)


async def measure_all(running: Stack, arguments: argparse.Namespace) -> list[str]:
    crowd = Crowd(port=running.ports[0], key=running.key)
    async with asyncio.TaskGroup() as group:  # ends all if a worker fails
        names = [f"worker-{i}" for i in range(arguments.workers)]
        workers = [group.create_task(crowd.run_worker(name)) for name in names]
        await asyncio.sleep(SETTLE_SECONDS)
        lines = [await measure_idle(running, arguments)]
        async with open_link(crowd.port) as link:
            lines += await measure_studies(running, arguments, crowd, *link)
        for task in workers:
            task.cancel()
    return lines


async def measure_studies(
    running: Stack,
    arguments: argparse.Namespace,
    crowd: Crowd,
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
) -> list[str]:
    """Measure how soon waiting workers get the trials of a new study."""

    async def post(path: str, body: Any) -> Any:
        return await send_request(reader, writer, crowd.key, path, body)

    lines, first = [], []
    for i in range(arguments.studies):
        study = await post("/v1/studies", make_spec(running, f"one-{i}", 1))
        created = time.perf_counter()
        at, _ = await asyncio.wait_for(crowd.granted.get(), 30)
        first.append(1000 * (at - created))
        await post(f"/v1/studies/{study['id']}/cancel", {})
    lines.append(
        f"from a study's creation to its lease: {statistics.median(first):.0f} ms, the median of "
        f"{len(first)} ({min(first):.0f} to {max(first):.0f})"
    )
    # All workers wake together: the last lease shows the throughput of the lease queue.
    study = await post("/v1/studies", make_spec(running, "all", arguments.workers))
    created = time.perf_counter()
    took = []
    for _ in range(arguments.workers):
        at, _ = await asyncio.wait_for(crowd.granted.get(), 60)
        took.append(at - created)
    await post(f"/v1/studies/{study['id']}/cancel", {})
    lines.append(f"a trial for each of them: {took[0]:.2f} s for the first, {took[-1]:.2f} for all")
    return lines


async def measure_idle(running: Stack, arguments: argparse.Namespace) -> str:
    """Measure CPU, connections and transactions while nothing happens."""
    with running.connect("service") as connection:

        def read_cpu() -> tuple[float, float]:
            postgres = machine.cpu_seconds([running.postgres_pid])
            return machine.cpu_seconds(running.api_pids), postgres

        before, start, most = read_cpu(), time.perf_counter(), 0
        commits = [count_commits(connection)]
        while time.perf_counter() - start < arguments.seconds:
            await asyncio.sleep(0.5)
            most = max(most, count_connections(connection))
        commits.append(count_commits(connection))
        spent = time.perf_counter() - start
    api, postgres = (100 * (b - a) / spent for a, b in zip(before, read_cpu(), strict=True))
    rate = (commits[1] - commits[0]) / spent
    return (
        f"{arguments.workers} workers idle for {spent:.0f} s: API {api:.1f} % of a core, "
        f"PostgreSQL {postgres:.1f} %, {most} connections, {rate:.1f} transactions/s"
    )


def count_connections(connection: Any) -> int:
    """Return the number of client connections, this connection excluded."""
    query = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'"
    return connection.execute(query).fetchone()[0] - 1


def count_commits(connection: Any) -> int:
    query = "SELECT xact_commit FROM pg_stat_database WHERE datname = current_database()"
    return connection.execute(query).fetchone()[0]


def make_spec(running: Stack, name: str, trials: int) -> dict[str, Any]:
    hpo = {"trials": trials, "parallel": trials, "sampler": "random", "pruner": "none"}
    return {
        "name": name,
        "data": {"source": str(running.corpus), "context": 32},
        "proxy": {"width": 32, "depth": 1, "head_dim": 16},
        "train": {"batch_size": 8, "num_tokens": 8 * 32 * 20, "evaluations": 4},
        "search_space": TRIAL,
        "hpo": hpo,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--studies", type=int, default=10)
    arguments = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="warmscale-", ignore_cleanup_errors=True) as folder,
        run_stack(Path(folder), replicas=1) as running,
    ):
        for line in asyncio.run(measure_all(running, arguments)):
            print(line)


if __name__ == "__main__":
    main()
