"""The two sides: each makes a study, and has client processes that run its cycles."""

import contextlib
import multiprocessing
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from multiprocessing.connection import Connection
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import optuna
from throughput import machine
from throughput.cycles import TOKENS, Cycle, OptunaCycle, ServiceCycle, TypedServiceCycle
from throughput.prefill import fill_trials
from throughput.stack import Stack
from throughput.workload import REPORTS, SPACE, Scenario, Spent

if TYPE_CHECKING:
    from multiprocessing.sharedctypes import Synchronized

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["optuna", "scipy.special", "httpx", __name__])


def run_client(
    pipe: Connection, tickets: "Synchronized[int]", threads: int, kind: type, *given: Any
) -> None:
    """Run a client process: prepare, and then run a cycle for each ticket until none is left."""
    made: list[Cycle] = [kind(*given)]
    made *= threads  # threads may share a study and a storage of Optuna
    while (message := pipe.recv()) is not None:
        if message != "go":
            made[0].prepare(*message)
            made[0]({})  # an untimed cycle for connections, caches and imports
            pipe.send(None)
            continue
        note: dict[str, list[float]] = {}
        cpu = time.process_time()
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(_take_tickets, made, repeat(tickets), repeat(note)))
        pipe.send((time.monotonic(), time.process_time() - cpu, note))
    made[0].close()


def _take_tickets(cycle: Cycle, tickets: "Synchronized[int]", note: dict[str, list[float]]) -> None:
    while True:
        with tickets.get_lock():
            if tickets.value == 0:
                return
            tickets.value -= 1
        cycle(note)


class Side:
    """A side: client processes, and their database."""

    name: str

    def __init__(self, running: Stack, processes: int, threads: int, *cycles: Any) -> None:
        self.running = running
        self.tickets = _context.Value("i", 0)
        self.pipes: list[Connection] = []
        self.processes = []
        for i in range(processes):
            own_end, client_end = _context.Pipe()
            arguments = (client_end, self.tickets, threads, *cycles[i % len(cycles)])
            self.pipes.append(own_end)
            self.processes.append(_context.Process(target=run_client, args=arguments, daemon=True))
            self.processes[-1].start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            with contextlib.suppress(BrokenPipeError):
                pipe.send(None)
            process.join(10)
            process.kill()

    def prepare_study(self, study: str, scenario: Scenario) -> None:
        """Make a study with finished trials, and run an untimed cycle in each client."""
        self.make_study(study, scenario)
        for pipe in self.pipes:
            pipe.send((study, scenario.pruner))
        for pipe in self.pipes:
            pipe.recv()

    def make_study(self, study: str, scenario: Scenario) -> None:
        """Create the study and its finished trials."""
        raise NotImplementedError

    def run_round(self, scenario: Scenario, spent: Spent) -> None:
        """Let the clients share the cycles of a round, and note times and costs."""
        self.tickets.value = scenario.cycles
        before = self._read_counters()
        start = time.monotonic()
        for pipe in self.pipes:
            pipe.send("go")
        ends, cpu, notes = zip(*(pipe.recv() for pipe in self.pipes), strict=True)
        after = self._read_counters()
        spent.per_second.append(scenario.cycles / (max(ends) - start))
        for note in notes:
            for call, times in note.items():
                spent.calls.setdefault(call, []).extend(times)
        # Costs of a trial: the difference of the counters, divided by the cycles of the round.
        used = {name: after[name] - before[name] for name in after} | {"clients": sum(cpu)}
        for name in ("api", "postgres", "clients"):
            spent.cpu_ms.setdefault(name, []).append(1000 * used[name] / scenario.cycles)
        spent.commits.append(used["commits"] / scenario.cycles)
        spent.wal_kb.append(used["wal_bytes"] / 1024 / scenario.cycles)

    def _read_counters(self) -> dict[str, float]:
        time.sleep(0.05)  # PostgreSQL counts a commit a moment later
        query = (
            "SELECT xact_commit, pg_current_wal_lsn() - '0/0'::pg_lsn FROM pg_stat_database"
            " WHERE datname = current_database()"
        )
        with self.running.connect(self.name) as connection:
            row = connection.execute(query).fetchone()
        assert row is not None
        return {
            "api": machine.cpu_seconds(self.running.api_pids),
            "postgres": machine.cpu_seconds([self.running.postgres_pid]),
            "commits": row[0],
            "wal_bytes": float(row[1]),
        }


class Optuna(Side):
    """Raw Optuna, with a process or a thread for each client."""

    name = "optuna"

    def __init__(self, running: Stack, clients: int, *, threads: bool) -> None:
        processes, each = (1, clients) if threads else (clients, 1)
        super().__init__(running, processes, each, (OptunaCycle, running.optuna_url))

    def make_study(self, study: str, scenario: Scenario) -> None:
        storage = optuna.storages.RDBStorage(self.running.optuna_url)
        optuna.create_study(study_name=study, storage=storage)
        fill_trials(self.running, "optuna", study, scenario.finished - 1)
        assert len(optuna.load_study(study_name=study, storage=storage).trials) == scenario.finished
        storage.engine.dispose()


class Service(Side):
    """The service, with a process for each client that only sends and waits."""

    name = "service"

    def __init__(self, running: Stack, clients: int, *, typed: bool) -> None:
        cycle = TypedServiceCycle if typed else ServiceCycle
        addresses = [(cycle, port, running.key) for port in running.ports]
        super().__init__(running, clients, 1, *addresses)

    def make_study(self, study: str, scenario: Scenario) -> None:
        cycle = ServiceCycle(self.running.ports[0], self.running.key)
        with contextlib.closing(cycle) as api:
            api.post("/v1/studies", self._make_spec(study, scenario.pruner))
            api.prepare(study, scenario.pruner)
            api({})
            (template,) = api.get(f"/v1/runs?study={study}")["items"]
            fill_trials(self.running, "service", study, scenario.finished - 1, template["id"])
            assert api.get(f"/v1/studies/{study}")["trials"]["succeeded"] == scenario.finished

    def _make_spec(self, study: str, pruner: str) -> dict[str, Any]:
        return {
            "name": study,
            "data": {"source": str(self.running.corpus), "context": 32},
            "proxy": {"width": 32, "depth": 1, "head_dim": 16},
            "train": {"batch_size": 8, "num_tokens": TOKENS, "evaluations": REPORTS},
            "search_space": SPACE,
            "hpo": {"trials": 100_000, "parallel": 1024, "sampler": "tpe", "pruner": pruner},
        }
