"""Studies one after another under faults, until the time is up; then what must always hold."""

import contextlib
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from benchmarks.chaos.faults import Check, Faults
from benchmarks.chaos.schedule import Fault
from benchmarks.chaos.stack import NUM_APIS, ChaosError, Stack
from service.client import Client
from service.database.engine import optuna_url
from service.operations import invariants
from service.optuna_bridge.sampler import Sampler

STUDY_SECONDS = 600.0
_SETTLE_SECONDS = 120.0
_RECOVERY_SECONDS = 120.0
_VICTIM_SECONDS = 20.0
_TICK_SECONDS = 0.2
_GONE = "processes of a parent that was killed"

_Repair = tuple[float, float, Callable[[], None], str, Check | None]  # due, struck, …


@dataclass(kw_only=True)
class Driver:
    """The loop. The schedule's clock stands still while a study is checked or a victim awaited."""

    stack: Stack
    schedule: list[Fault]
    seconds: float
    spec: dict[str, Any]
    struck: Counter[str] = field(default_factory=Counter)
    missed: Counter[str] = field(default_factory=Counter)
    recoveries: list[tuple[str, float]] = field(default_factory=list)
    studies: list[str] = field(default_factory=list)
    lost: int = 0
    doubled: int = 0
    violations: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def run(self) -> None:
        self._faults = Faults(stack=self.stack)
        self._repairs: list[_Repair] = []
        self._awaited: list[tuple[float, str, Check]] = []
        self._due = list(self.schedule)
        self._clock = self._elapsed = 0.0
        self._waits_since: float | None = None
        self._last = time.monotonic()
        with Client(self.stack.url, self.stack.key, patience_seconds=120) as client:
            while self._elapsed < self.seconds and not self.errors:
                self._study(client)

    def _study(self, client: Client) -> None:
        name = f"chaos-{len(self.studies)}"
        client.post("/v1/studies", self.spec | {"name": name}, idempotency_key=name)
        self.studies.append(name)
        self._wait_for_work()
        self._last = time.monotonic()
        started = self._elapsed
        while (state := self._state(name)) in (None, "active"):
            if self._elapsed - started > STUDY_SECONDS:
                raise ChaosError(f"study {name} did not end in {STUDY_SECONDS} s")
            self._tick()
        if state != "completed":
            self.errors.append(f"study {name} is {state}")
        self._settle(client, name)

    def _wait_for_work(self) -> None:
        """The time counts from when a fleet trains: on a busy machine that takes a while."""
        query = text("SELECT count(*) FROM warmscale.runs WHERE attempt > 0")
        deadline = time.monotonic() + _SETTLE_SECONDS
        while time.monotonic() < deadline:
            with self.stack.engine.connect() as connection:
                if connection.execute(query).scalar_one():
                    return
            self.stack.must_stand()
            time.sleep(_TICK_SECONDS)
        raise ChaosError(f"no fleet trains after {_SETTLE_SECONDS} s")

    def _tick(self) -> None:
        now = time.monotonic()
        self._elapsed += now - self._last
        if self._waits_since is None:
            self._clock += now - self._last
        self._last = now
        if self._elapsed > self.seconds:
            self._due.clear()
        while self._due and self._due[0].at_seconds <= self._clock:
            if not self._strike(self._due[0]):
                break  # no victim just now
            self._due.pop(0)
            self._waits_since = None
        for repair in [r for r in self._repairs if r[0] <= now]:
            self._repair(repair)
        self._look_for_recoveries()
        self.stack.must_stand()
        time.sleep(_TICK_SECONDS)

    def _strike(self, fault: Fault) -> bool:
        """False: try again, until it has had its time."""
        try:
            struck = self._faults.strike(fault)
        except DBAPIError:
            struck = None
        if struck is None:
            self._waits_since = self._waits_since or self._last
            if self._last - self._waits_since < _VICTIM_SECONDS:
                return False
            self.missed[fault.kind] += 1
            return True
        self.struck[fault.kind] += 1
        now = time.monotonic()
        if struck.is_gone is not None:
            self._awaited.append((now, _GONE, struck.is_gone))
        if struck.repair is not None:
            repair = struck.repair, fault.kind, struck.is_over
            self._repairs.append((now + struck.repair_after, now, *repair))
        elif struck.is_over is not None:
            self._awaited.append((now, fault.kind, struck.is_over))
        return True

    def _repair(self, repair: _Repair) -> None:
        self._repairs.remove(repair)
        _, since, mend, kind, is_over = repair
        mend()
        if is_over is not None:
            self._awaited.append((since, kind, is_over))

    def _look_for_recoveries(self) -> None:
        for one in list(self._awaited):
            since, kind, is_over = one
            if time.monotonic() - since > _RECOVERY_SECONDS:
                raise ChaosError(f"{kind}: not over {_RECOVERY_SECONDS} s later")
            with contextlib.suppress(DBAPIError):
                if is_over():
                    self._awaited.remove(one)
                    if kind != _GONE:
                        self.recoveries.append((kind, time.monotonic() - since))

    def _state(self, name: str) -> str | None:
        """None: the database is away."""
        query = text("SELECT state FROM warmscale.studies WHERE name = :name")
        with contextlib.suppress(DBAPIError), self.stack.engine.connect() as connection:
            return connection.execute(query, {"name": name}).scalar_one()
        return None

    def _settle(self, client: Client, name: str) -> None:
        """Undo what is broken, wait until nothing is on its way, and count."""
        for repair in list(self._repairs):
            self._repair(repair)
        for i in range(NUM_APIS):
            self.stack.wait_api(i)
        deadline = time.monotonic() + _SETTLE_SECONDS
        while self._untold():
            if time.monotonic() > deadline:
                break  # the check says of which
            time.sleep(_TICK_SECONDS)
        self._look_for_recoveries()
        with invariants.open_snapshot(self.stack.engine) as session:
            report = invariants.check_database(session, at_rest=True, with_files=True)
        hidden = self._corrupted_uris()
        self.violations = [
            f"{v.invariant} {v.study_id} {v.run_id}: {v.seen}"
            for v in report.violations
            if not (v.invariant == "files-whole" and any(f"{uri}: " in v.seen for uri in hidden))
        ]
        self._count(client, name)
        if self.violations or self.lost or self.doubled:
            self.errors.append(f"study {name}: {self.violations[:3]}")

    def _untold(self) -> int:
        query = text("SELECT count(*) FROM warmscale.runs WHERE kind = 'trial' AND NOT told")
        with self.stack.engine.connect() as connection:
            return connection.execute(query).scalar_one()

    def _corrupted_uris(self) -> list[str]:
        """What this program has broken itself, and nobody had to read again."""
        query = text("SELECT uri FROM warmscale.checkpoints WHERE hash = ANY(:hashes)")
        with self.stack.engine.connect() as connection:
            rows = connection.execute(query, {"hashes": list(self._faults.corrupted)})
            return list(rows.scalars())

    def _count(self, client: Client, name: str) -> None:
        """By way of the API and of Optuna, not of the checker."""
        trials = client.list_items(f"/v1/studies/{name}/trials")
        sampler = Sampler(optuna_url(self.stack.database.url), pool_size=1)
        heard = sampler.states(name)
        sampler.close()
        lost, doubled = counted(self.spec["hpo"]["trials"], trials, heard)
        self.lost, self.doubled = self.lost + lost, self.doubled + doubled

    def dump(self) -> str:
        """What there is to see when it went wrong."""
        lines = [*self.errors, *self.violations[:20]]
        with contextlib.suppress(DBAPIError), self.stack.engine.connect() as connection:
            query = """SELECT kind, state, count(*), max(attempt) AS attempts,
                max(failures) AS failures, max(right(error, 300)) AS error
                FROM warmscale.runs GROUP BY kind, state"""
            lines += [str(tuple(row)) for row in connection.execute(text(query))]
        logs = sorted(Path(self.stack.folder).glob("*.log"))
        return "\n".join(
            [*lines, *(f"--- {log.name}\n{self.stack.tail(log.stem)}" for log in logs)]
        )


def counted(
    budget: int, trials: list[dict[str, Any]], heard: dict[int, tuple[str, float | None]]
) -> tuple[int, int]:
    """Trials of the budget that came to no end, here or in Optuna, and ends too many."""
    ended = [t["number"] for t in trials if t["state"] in ("succeeded", "pruned")]
    told = [number for number, (state, _) in heard.items() if state in ("COMPLETE", "PRUNED")]
    wanted = set(range(budget))
    lost = len(wanted - (set(ended) & set(told)))
    doubled = len(ended) - len(set(ended)) + len((set(ended) | set(told)) - wanted)
    return lost, doubled
