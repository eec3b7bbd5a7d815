"""The loop of chaos: studies under faults, in turn, with a check after each study."""

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

_Repair = tuple[
    float, float, Callable[[], None], str, Check | None
]  # due, struck at, repair, kind, check


@dataclass(kw_only=True)
class Driver:
    """Runner of studies and faults.

    The clock of the schedule stops during the check of a study and the wait for a victim.
    """

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
                self._run_study(client)

    def _run_study(self, client: Client) -> None:
        name = f"chaos-{len(self.studies)}"
        client.post("/v1/studies", self.spec | {"name": name}, idempotency_key=name)
        self.studies.append(name)
        self._wait_for_work()
        self._last = time.monotonic()
        started = self._elapsed
        while (state := self._read_state(name)) in (None, "active"):
            if self._elapsed - started > STUDY_SECONDS:
                raise ChaosError(f"study {name} did not end in {STUDY_SECONDS} s")
            self._run_tick()
        if state != "completed":
            # Every trial has 10 attempts: no schedule of faults should exhaust them.
            self.errors.append(f"study {name} is {state}")
        self._settle_study(client, name)

    def _wait_for_work(self) -> None:
        """Wait until a fleet trains; on a busy machine that takes time, which does not count."""
        query = text("SELECT count(*) FROM warmscale.runs WHERE attempt > 0")
        deadline = time.monotonic() + _SETTLE_SECONDS
        while time.monotonic() < deadline:
            with self.stack.engine.connect() as connection:
                if connection.execute(query).scalar_one():
                    return
            self.stack.check_running()
            time.sleep(_TICK_SECONDS)
        raise ChaosError(f"no fleet trains after {_SETTLE_SECONDS} s")

    def _run_tick(self) -> None:
        # Two clocks: `_elapsed` ends the program, and `_clock` drives the schedule. A fault without
        # a victim stops `_clock`, so that the later faults keep their distances.
        now = time.monotonic()
        self._elapsed += now - self._last
        if self._waits_since is None:
            self._clock += now - self._last
        self._last = now
        if self._elapsed > self.seconds:
            self._due.clear()
        while self._due and self._due[0].at_seconds <= self._clock:
            if not self._try_strike(self._due[0]):
                break  # no victim at the moment
            self._due.pop(0)
            self._waits_since = None
        for repair in [r for r in self._repairs if r[0] <= now]:
            self._run_repair(repair)
        self._note_recoveries()
        self.stack.check_running()
        time.sleep(_TICK_SECONDS)

    def _try_strike(self, fault: Fault) -> bool:
        """Strike and return True; return False to try again later, up to a time limit."""
        try:
            struck = self._faults.strike_fault(fault)
        except DBAPIError:
            struck = None
        # Example: "kill-worker" on fleet 0 waits until fleet 0 trains a run again. After 20 s
        # without a victim the fault counts as missed.
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

    def _run_repair(self, repair: _Repair) -> None:
        self._repairs.remove(repair)
        _, since, mend, kind, is_over = repair
        mend()
        if is_over is not None:
            self._awaited.append((since, kind, is_over))

    def _note_recoveries(self) -> None:
        for awaited in list(self._awaited):
            since, kind, is_over = awaited
            if time.monotonic() - since > _RECOVERY_SECONDS:
                raise ChaosError(f"{kind}: no recovery within {_RECOVERY_SECONDS} s")
            with contextlib.suppress(DBAPIError):
                if is_over():
                    self._awaited.remove(awaited)
                    if kind != _GONE:
                        self.recoveries.append((kind, time.monotonic() - since))

    def _read_state(self, name: str) -> str | None:
        """Return the state of a study; None while the database is away."""
        query = text("SELECT state FROM warmscale.studies WHERE name = :name")
        with contextlib.suppress(DBAPIError), self.stack.engine.connect() as connection:
            return connection.execute(query, {"name": name}).scalar_one()
        return None

    def _settle_study(self, client: Client, name: str) -> None:
        """Repair everything, wait until all ends reached Optuna, check and count."""
        for repair in list(self._repairs):
            self._run_repair(repair)
        for i in range(NUM_APIS):
            self.stack.wait_api(i)
        deadline = time.monotonic() + _SETTLE_SECONDS
        while self._count_untold():
            if time.monotonic() > deadline:
                break  # the check below names the runs
            time.sleep(_TICK_SECONDS)
        self._note_recoveries()
        with invariants.open_snapshot(self.stack.engine) as session:
            # The checker reads every checkpoint, also those that `corrupt-checkpoint` damaged.
            report = invariants.check_database(session, at_rest=True, with_files=True)
        hidden = self._corrupted_uris()
        self.violations = [
            f"{v.invariant} {v.study_id} {v.run_id}: {v.seen}"
            for v in report.violations
            if not (v.invariant == "files-whole" and any(f"{uri}: " in v.seen for uri in hidden))
        ]
        self._count_trials(client, name)
        if self.violations or self.lost or self.doubled:
            self.errors.append(f"study {name}: {self.violations[:3]}")

    def _count_untold(self) -> int:
        query = text("SELECT count(*) FROM warmscale.runs WHERE kind = 'trial' AND NOT told")
        with self.stack.engine.connect() as connection:
            return connection.execute(query).scalar_one()

    def _corrupted_uris(self) -> list[str]:
        """Return the URIs of checkpoints that this program damaged and that no run read since."""
        query = text("SELECT uri FROM warmscale.checkpoints WHERE hash = ANY(:hashes)")
        with self.stack.engine.connect() as connection:
            rows = connection.execute(query, {"hashes": list(self._faults.corrupted)})
            return list(rows.scalars())

    def _count_trials(self, client: Client, name: str) -> None:
        """Count trials through the API and through Optuna, independently of `db check`."""
        trials = client.list_items(f"/v1/studies/{name}/trials")
        sampler = Sampler(optuna_url(self.stack.database.url), pool_size=1)
        in_optuna = sampler.read_states(name)
        sampler.close()
        lost, doubled = count_lost_and_doubled(self.spec["hpo"]["trials"], trials, in_optuna)
        self.lost, self.doubled = self.lost + lost, self.doubled + doubled

    def format_evidence(self) -> str:
        """Return the errors, the states of all runs and the ends of all logs."""
        # Counts first, logs last: the end of a long output is often cut off.
        lines = [*self.errors, *self.violations[:20]]
        with contextlib.suppress(DBAPIError), self.stack.engine.connect() as connection:
            query = """SELECT kind, state, count(*), max(attempt) AS attempts,
                max(failures) AS failures, max(right(error, 300)) AS error
                FROM warmscale.runs GROUP BY kind, state"""
            lines += [str(tuple(row)) for row in connection.execute(text(query))]
        logs = sorted(Path(self.stack.folder).glob("*.log"))
        return "\n".join(
            [*lines, *(f"--- {log.name}\n{self.stack.read_tail(log.stem)}" for log in logs)]
        )


def count_lost_and_doubled(
    budget: int, trials: list[dict[str, Any]], in_optuna: dict[int, tuple[str, float | None]]
) -> tuple[int, int]:
    """Return the numbers of lost and doubled trials.

    A trial is lost if it has no end in the API or no end in Optuna. A trial is doubled if it ended
    twice, or is not part of the budget.
    """
    ended = [t["number"] for t in trials if t["state"] in ("succeeded", "pruned")]
    optuna_ended = [
        number for number, (state, _) in in_optuna.items() if state in ("COMPLETE", "PRUNED")
    ]
    wanted = set(range(budget))
    lost = len(wanted - (set(ended) & set(optuna_ended)))
    doubled = len(ended) - len(set(ended)) + len((set(ended) | set(optuna_ended)) - wanted)
    return lost, doubled
