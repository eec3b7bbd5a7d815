"""The faults. Each returns its repair, and a check for the recovery."""

import contextlib
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from sqlalchemy import text

from benchmarks.chaos.schedule import Fault
from benchmarks.chaos.stack import LEASE_SECONDS, Stack, filter_running, kill_parent
from warmcore.storage.locations import local_path

Check = Callable[[], bool]


@dataclass(frozen=True, kw_only=True)
class StruckFault:
    """A fault that struck: its repair, due after `repair_after` seconds, and its checks.

    `is_over` returns whether the stack has recovered. `is_gone` returns whether the children of a
    killed process are gone.
    """

    repair_after: float = 0.0
    repair: Callable[[], None] | None = None
    is_over: Check | None = None
    is_gone: Check | None = None


@dataclass(kw_only=True)
class Faults:
    """Faults on a stack. A fault without a victim at the moment returns None."""

    stack: Stack
    corrupted: set[str] = field(default_factory=set)

    def strike_fault(self, fault: Fault) -> StruckFault | None:
        name = fault.kind.replace("-", "_")
        return getattr(self, f"_{name}")(fault.victim, fault.share)

    def _kill_api(self, i: int, share: float) -> StruckFault | None:
        process = self.stack.apis[i]
        if process is None:
            return None
        self.stack.apis[i] = None
        below = kill_parent(process)
        return StruckFault(
            repair_after=2 * share,
            repair=lambda: self.stack.start_api(i),
            is_over=lambda: self.stack.is_ready(i),
            is_gone=lambda: not filter_running(below),
        )

    def _kill_fleet(self, i: int, share: float) -> StruckFault | None:
        process, runs = self.stack.fleets[i], self._leased_runs(i)
        if process is None:
            return None
        # None keeps `check_running` from starting the fleet again before its repair is due.
        self.stack.fleets[i] = None
        below = kill_parent(process)  # its Ray must notice that by itself
        self.stack.seen += below
        return StruckFault(
            repair_after=2 * share,
            repair=lambda: self.stack.start_fleet(i),
            is_over=lambda: self._have_moved_on(runs),
            is_gone=lambda: not filter_running(below),
        )

    def _kill_worker(self, i: int, _share: float) -> StruckFault | None:
        runs, victims = self._leased_runs(i), self.stack.find_workers(i)
        if not victims or not runs:
            return None
        _send_signal(victims, signal.SIGKILL)
        return StruckFault(is_over=lambda: self._have_moved_on(runs))

    def _kill_database(self, _i: int, share: float) -> StruckFault | None:
        if not self.stack.database.is_running:
            return None
        self.stack.database.kill()
        apis = range(len(self.stack.apis))
        return StruckFault(
            repair_after=3 * share,
            repair=self.stack.database.start,
            is_over=lambda: all(self.stack.is_ready(i) for i in apis),
        )

    def _pause_worker(self, i: int, share: float) -> StruckFault | None:
        runs, victims = self._leased_runs(i), self.stack.find_workers(i)
        if not victims or not runs:
            return None
        _send_signal(victims, signal.SIGSTOP)
        # Longer than the lease: another attempt holds the run when the process continues.
        return StruckFault(
            repair_after=LEASE_SECONDS + 1.5 + 2 * share,
            repair=lambda: _send_signal(victims, signal.SIGCONT),
            is_over=lambda: self._have_moved_on(runs),
        )

    def _cut_connections(self, _i: int, share: float) -> StruckFault:
        self.stack.proxy.cut_answers(answers=6, after_bytes=int(400 * share))
        return StruckFault()

    def _delay_connections(self, _i: int, share: float) -> StruckFault:
        self.stack.proxy.delay_seconds = share
        return StruckFault(repair_after=4.0, repair=self._end_delay)

    def _end_delay(self) -> None:
        self.stack.proxy.delay_seconds = 0.0

    def _fill_disk(self, _i: int, share: float) -> StruckFault | None:
        if not self.stack.disk.can_fill:
            return None
        self.stack.disk.fill_up()
        return StruckFault(repair_after=2 + 4 * share, repair=self.stack.disk.restore_size)

    def _corrupt_checkpoint(self, i: int, share: float) -> StruckFault | None:
        """Flip a bit of the newest checkpoint of a run of fleet `i`, and kill the run's process."""
        runs, victims = self._leased_runs(i), self.stack.find_workers(i)
        newest = self._newest_checkpoint(list(runs)) if victims else None
        if newest is None:
            return None
        _send_signal(victims, signal.SIGSTOP)  # it must not publish a newer checkpoint
        uri, hash_ = newest
        with contextlib.suppress(
            FileNotFoundError
        ):  # the checkpoint may have been superseded and deleted
            flip_bit(Path(local_path(uri) or uri) / "model.safetensors", share)
            self.corrupted.add(hash_)
        _send_signal(victims, signal.SIGKILL)
        return StruckFault(is_over=lambda: self._have_moved_on(runs))

    def _leased_runs(self, i: int) -> dict[str, int]:
        """Return the attempt of each run that the fleet has leased, by run id."""
        query = (
            "SELECT id, attempt FROM warmscale.runs WHERE state = 'leased' AND worker LIKE :name"
        )
        with self.stack.engine.connect() as connection:
            rows = connection.execute(text(query), {"name": f"fleet-{i}.%"}).all()
        return {row.id: row.attempt for row in rows}

    def _have_moved_on(self, runs: dict[str, int]) -> bool:
        """Return whether each run has ended or begun another attempt."""
        query = "SELECT id, attempt, state FROM warmscale.runs WHERE id = ANY(:ids)"
        with self.stack.engine.connect() as connection:
            rows = connection.execute(text(query), {"ids": list(runs)}).all()
        # A run that is neither queued nor leased has ended, and counts as the next attempt.
        live = {row.id: row.attempt for row in rows if row.state in ("queued", "leased")}
        return all(live.get(run, attempt + 1) > attempt for run, attempt in runs.items())

    def _newest_checkpoint(self, runs: list[str]) -> tuple[str, str] | None:
        query = """SELECT uri, hash FROM warmscale.checkpoints WHERE run_id = ANY(:ids)
            AND NOT superseded AND NOT final ORDER BY attempt DESC, step DESC LIMIT 1"""
        with self.stack.engine.connect() as connection:
            row = connection.execute(text(query), {"ids": runs}).one_or_none()
        return None if row is None else (row.uri, row.hash)


def flip_bit(path: Path, share: float) -> None:
    position = int(share * path.stat().st_size)
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1]))


def _send_signal(processes: list[psutil.Process], number: int) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)
