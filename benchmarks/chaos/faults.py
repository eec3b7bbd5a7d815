"""The faults themselves. Each returns what undoes it, and how to tell that it is got over."""

import contextlib
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from sqlalchemy import text

from benchmarks.chaos.schedule import Fault
from benchmarks.chaos.stack import LEASE_SECONDS, Stack, alive, kill_alone
from warmcore.storage.locations import local_path

Check = Callable[[], bool]


@dataclass(frozen=True, kw_only=True)
class Struck:
    """`repair` after so many seconds; `is_over` then says whether things run again.

    `is_gone` says whether what should have died with its parent is dead.
    """

    repair_after: float = 0.0
    repair: Callable[[], None] | None = None
    is_over: Check | None = None
    is_gone: Check | None = None


@dataclass(kw_only=True)
class Faults:
    """Strikes a stack. None: there is no victim just now."""

    stack: Stack
    corrupted: set[str] = field(default_factory=set)

    def strike(self, fault: Fault) -> Struck | None:
        name = fault.kind.replace("-", "_")
        return getattr(self, f"_{name}")(fault.victim, fault.share)

    def _kill_api(self, i: int, share: float) -> Struck | None:
        process = self.stack.apis[i]
        if process is None:
            return None
        self.stack.apis[i] = None
        below = kill_alone(process)
        return Struck(
            repair_after=2 * share,
            repair=lambda: self.stack.start_api(i),
            is_over=lambda: self.stack.is_ready(i),
            is_gone=lambda: not alive(below),
        )

    def _kill_fleet(self, i: int, share: float) -> Struck | None:
        process, runs = self.stack.fleets[i], self._leased(i)
        if process is None:
            return None
        self.stack.fleets[i] = None
        below = kill_alone(process)  # its Ray has to find out by itself
        self.stack.seen += below
        return Struck(
            repair_after=2 * share,
            repair=lambda: self.stack.start_fleet(i),
            is_over=lambda: self._moved_on(runs),
            is_gone=lambda: not alive(below),
        )

    def _kill_worker(self, i: int, _share: float) -> Struck | None:
        runs, victims = self._leased(i), self.stack.workers(i)
        if not victims or not runs:
            return None
        _signal(victims, signal.SIGKILL)
        return Struck(is_over=lambda: self._moved_on(runs))

    def _kill_database(self, _i: int, share: float) -> Struck | None:
        if not self.stack.database.is_running:
            return None
        self.stack.database.kill()
        apis = range(len(self.stack.apis))
        return Struck(
            repair_after=3 * share,
            repair=self.stack.database.start,
            is_over=lambda: all(self.stack.is_ready(i) for i in apis),
        )

    def _pause_worker(self, i: int, share: float) -> Struck | None:
        runs, victims = self._leased(i), self.stack.workers(i)
        if not victims or not runs:
            return None
        _signal(victims, signal.SIGSTOP)
        return Struck(
            repair_after=LEASE_SECONDS + 1.5 + 2 * share,
            repair=lambda: _signal(victims, signal.SIGCONT),
            is_over=lambda: self._moved_on(runs),
        )

    def _cut_connections(self, _i: int, share: float) -> Struck:
        self.stack.proxy.cut(answers=6, after_bytes=int(400 * share))
        return Struck()

    def _delay_connections(self, _i: int, share: float) -> Struck:
        self.stack.proxy.delay_seconds = share
        return Struck(repair_after=4.0, repair=self._no_delay)

    def _no_delay(self) -> None:
        self.stack.proxy.delay_seconds = 0.0

    def _fill_disk(self, _i: int, share: float) -> Struck | None:
        if not self.stack.disk.can_fill:
            return None
        self.stack.disk.fill()
        return Struck(repair_after=2 + 4 * share, repair=self.stack.disk.free)

    def _corrupt_checkpoint(self, i: int, share: float) -> Struck | None:
        """Flip a bit of the newest checkpoint of fleet `i`'s run, and kill the run's process."""
        runs, victims = self._leased(i), self.stack.workers(i)
        newest = self._newest_checkpoint(list(runs)) if victims else None
        if newest is None:
            return None
        _signal(victims, signal.SIGSTOP)  # so that it publishes no newer one meanwhile
        uri, found = newest
        with contextlib.suppress(FileNotFoundError):  # it may just have been superseded
            flip_bit(Path(local_path(uri) or uri) / "model.safetensors", share)
            self.corrupted.add(found)
        _signal(victims, signal.SIGKILL)
        return Struck(is_over=lambda: self._moved_on(runs))

    def _leased(self, i: int) -> dict[str, int]:
        """Attempt of each run that the fleet has."""
        query = (
            "SELECT id, attempt FROM warmscale.runs WHERE state = 'leased' AND worker LIKE :name"
        )
        with self.stack.engine.connect() as connection:
            rows = connection.execute(text(query), {"name": f"fleet-{i}.%"}).all()
        return {row.id: row.attempt for row in rows}

    def _moved_on(self, runs: dict[str, int]) -> bool:
        """Whether another attempt of each has begun, or it has ended."""
        query = "SELECT id, attempt, state FROM warmscale.runs WHERE id = ANY(:ids)"
        with self.stack.engine.connect() as connection:
            rows = connection.execute(text(query), {"ids": list(runs)}).all()
        live = {row.id: row.attempt for row in rows if row.state in ("queued", "leased")}
        return all(live.get(run, attempt + 1) > attempt for run, attempt in runs.items())

    def _newest_checkpoint(self, runs: list[str]) -> tuple[str, str] | None:
        query = """SELECT uri, hash FROM warmscale.checkpoints WHERE run_id = ANY(:ids)
            AND NOT superseded AND NOT final ORDER BY attempt DESC, step DESC LIMIT 1"""
        with self.stack.engine.connect() as connection:
            row = connection.execute(text(query), {"ids": runs}).one_or_none()
        return None if row is None else (row.uri, row.hash)


def flip_bit(path: Path, share: float) -> None:
    place = int(share * path.stat().st_size)
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))


def _signal(processes: list[psutil.Process], number: int) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)
