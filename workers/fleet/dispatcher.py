"""The loop of a fleet: free resources become leases, and leases become Ray tasks.

A loop on the main thread takes events from a queue and waits for nothing else. A thread asks for
leases while resources are free (a long poll). Ray's callbacks queue the ends of runs, and signals
queue the drain. Free resources are therefore offered again at once.
"""

import functools
import logging
import queue
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from service.protocol import FinishRequest, Lease, LeaseRequest, RunKind
from warmcore.storage.backoff import Backoff
from workers.failures import describe_failure
from workers.fleet.capacity import Nodes, Placement
from workers.fleet.ray_engine import Engine, Handle, RayLostError
from workers.fleet.service_link import FleetRefusedError, ServiceLink
from workers.processes.single import Connection
from workers.run_logs import run_fields

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger(__name__)

_MAX_RUNS = 64  # limit of the protocol
# While runs are running, a run may end and free more than was offered. A short poll lets the next
# request offer everything that is free by then.
_BUSY_WAIT_SECONDS = 1.0
_IDLE_WAIT_SECONDS = 2.0
_PAUSE_SECONDS = 0.2
_AWAY_BACKOFF = Backoff(first_seconds=1.0, max_seconds=15.0)
_TICK_SECONDS = 0.2
_KILLED_SECONDS = 10.0
# Share of the lease after which a run that has not begun is given back. A process may need the
# first half to start; the second half leaves time to reach the service.
_QUEUED_SHARE = 1 / 2


@dataclass(frozen=True, kw_only=True)
class DispatcherOptions:
    """Settings of a fleet: the service, the runs that it leases, and its times."""

    url: str
    api_key: str = field(repr=False)
    name: str
    study: str | None = None
    kinds: tuple[RunKind, ...] | None = None
    checkpoint_seconds: float = 30.0
    exit_when_idle_seconds: float | None = None
    drain_seconds: float = 60.0


@dataclass(frozen=True, kw_only=True)
class _Running:
    lease: Lease
    handle: Handle
    started: float


class Dispatcher:
    """Loop that runs leases on an engine. Only `drain` may be called from another thread."""

    def __init__(self, engine: Engine, options: DispatcherOptions) -> None:
        self._engine, self._options = engine, options
        self._connection = Connection(url=options.url, api_key=options.api_key)
        self._link = ServiceLink(options.url, options.api_key)
        self._events: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._nodes = Nodes()
        self._running: dict[str, _Running] = {}
        self._due: dict[str, float] = {}  # when a submitted run must have begun, by lease token
        self._is_asking = False
        self._away_pauses = _AWAY_BACKOFF.iterate_pauses()
        self._ask_at = self._busy_at = time.monotonic()
        self._kill_at: float | None = None
        self._refusal: FleetRefusedError | None = None

    def drain(self) -> None:
        """Stop leasing and give every run back with a checkpoint; safe in a signal handler."""
        self._events.put(self._drain_runs)

    def run(self) -> None:
        """Run leases until the fleet is drained, or idle for as long as the options allow.

        Raises:
            FleetRefusedError: the service refused the fleet; its runs have been given back.
            RayLostError: Ray is gone; the failures of its runs have been reported.
        """
        try:
            while not self._is_done():
                self._handle_next_event()
        except RayLostError as error:
            for running in self._running.values():
                self._report_failure(running.lease, error)
            raise
        finally:
            self._link.close()
        if self._refusal is not None:
            raise self._refusal

    def _handle_next_event(self) -> None:
        if self._should_ask():
            self._ask_for_leases()
        self._give_back_queued_runs()
        try:
            self._events.get(timeout=_TICK_SECONDS)()
        except queue.Empty:
            self._kill_undrained_runs()

    def _is_done(self) -> bool:
        now = time.monotonic()
        if self._kill_at is not None:
            is_waiting = self._running or self._is_asking
            return not is_waiting or now > self._kill_at + _KILLED_SECONDS
        idle = self._options.exit_when_idle_seconds
        if idle is None or self._running or self._is_asking:
            return False
        return now >= self._busy_at + idle

    # Only a single request is pending, so that the offered resources stay free until the answer.

    def _should_ask(self) -> bool:
        return not self._is_asking and self._kill_at is None and time.monotonic() >= self._ask_at

    def _ask_for_leases(self) -> None:
        total, available = self._engine.list_nodes(), self._engine.list_free()
        self._nodes.update_nodes(total, available, now=time.monotonic())
        offer = self._nodes.next_offer()
        if offer is None:
            return
        wait = _BUSY_WAIT_SECONDS if self._running else _IDLE_WAIT_SECONDS
        idle = self._options.exit_when_idle_seconds
        request = LeaseRequest(
            worker=self._options.name,
            resources=offer.resources,
            max_runs=_MAX_RUNS,
            study=self._options.study,
            kinds=self._options.kinds,
            wait_seconds=wait if idle is None else min(wait, idle),
        )
        self._is_asking = True

        def put_answer(answer: tuple[Lease, ...] | Exception) -> None:
            self._events.put(functools.partial(self._handle_answer, offer.node, answer))

        self._link.request_leases(request, put_answer)

    def _handle_answer(self, node: str, answer: tuple[Lease, ...] | Exception) -> None:
        self._is_asking = False
        if isinstance(answer, Exception):
            self._handle_no_answer(answer)
            return
        self._away_pauses = _AWAY_BACKOFF.iterate_pauses()
        if not answer:
            self._ask_at = time.monotonic() + _PAUSE_SECONDS
        elif self._kill_at is None:
            for lease in answer:
                self._start_run(lease, node)
        else:
            for lease in answer:
                self._link.finish_attempt(lease, FinishRequest(outcome="released"))

    def _handle_no_answer(self, error: Exception) -> None:
        if isinstance(error, FleetRefusedError):
            self._refusal = error
            self._drain_runs()
            return
        self._ask_at = time.monotonic() + next(self._away_pauses)

    def _start_run(self, lease: Lease, node: str) -> None:
        seconds = self._options.checkpoint_seconds
        try:
            handle = self._engine.submit_lease(lease, node, self._connection, seconds)
        except Exception as error:  # noqa: BLE001 - fails this run; `nodes()` notices a lost Ray
            self._report_failure(lease, error)
            return
        token = lease.lease_token
        now = time.monotonic()
        self._nodes.place_run(token, Placement(node=node, resources=lease.resources), now=now)
        self._running[token] = _Running(lease=lease, handle=handle, started=now)
        self._due[token] = now + _QUEUED_SHARE * lease.lease_seconds
        needs = {"cpus": lease.resources.cpus, "gpus": lease.resources.gpus}
        about = {"kind": lease.kind, "trial": lease.trial_number, "arm": lease.arm}
        log.info(
            "lease", extra=run_fields(lease) | {"name_of_study": lease.study_name} | about | needs
        )
        handle.future.add_done_callback(
            lambda future: self._events.put(functools.partial(self._handle_end, token, future))
        )

    def _handle_end(self, token: str, future: Future[str]) -> None:
        running = self._running.pop(token)
        self._due.pop(token, None)
        self._nodes.remove_run(token)
        self._ask_at = self._busy_at = time.monotonic()
        error = future.exception()
        if error is not None:
            self._free_groups(running.lease)
            self._report_failure(running.lease, error)
            return
        seconds = round(time.monotonic() - running.started, 2)
        how = {"outcome": future.result(), "seconds": seconds}
        log.info("end", extra=run_fields(running.lease) | how)

    def _give_back_queued_runs(self) -> None:
        """Give back each run that has not begun by half of its lease.

        Another fleet of this Ray took its CPUs first, and no process renews a lease in Ray's queue.
        """
        now = time.monotonic()
        for token in [token for token, due in self._due.items() if now >= due]:
            del self._due[token]
            running = self._running[token]
            if not self._engine.has_begun(running.handle):
                log.info("queued", extra=run_fields(running.lease))
                running.handle.drain()

    def _free_groups(self, failed: Lease) -> None:
        leases = [failed, *(running.lease for running in self._running.values())]
        if [lease for lease in leases if lease.resources.num_processes > 1] == [failed]:
            self._engine.free_groups()

    def _report_failure(self, lease: Lease, error: BaseException) -> None:
        finish = describe_failure(error, draining=self._kill_at is not None)
        last_line = str(error).strip().rsplit("\n", 1)[-1]
        how = {"outcome": finish.outcome, "retryable": finish.retryable, "error": last_line}
        log.warning("end", extra=run_fields(lease) | how)
        self._link.finish_attempt(lease, finish)

    # A drain asks every run to publish a checkpoint and return. Example with `drain_seconds` 60: a
    # run that returns within 60 s loses no step. A slower run is killed, and the fleet releases it:
    # it resumes from its last published checkpoint. The loop ends when no run is left, or 10 s
    # after the kill. If a lease arrives during the drain, `_handle_answer` releases it.

    def _drain_runs(self) -> None:
        if self._kill_at is None:
            log.info("drain", extra={"runs": len(self._running)})
            self._kill_at = time.monotonic() + self._options.drain_seconds
            for running in self._running.values():
                running.handle.drain()

    def _kill_undrained_runs(self) -> None:
        if self._kill_at is not None and time.monotonic() > self._kill_at:
            for running in self._running.values():
                running.handle.kill()
