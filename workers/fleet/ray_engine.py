"""Ray, as far as a fleet needs it.

Set the environment of `workers.fleet.ray_environment` before importing this module.

Runs are tasks, not actors: when a fleet is killed its tasks die with it, while detached actors
would train on. `max_retries=0`: the service alone decides what is tried again.
"""

import contextlib
import dataclasses
import logging
import os
import time
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import ray
from ray import PlacementGroupID  # only so can a group of another process be named
from ray.exceptions import AuthenticationError, RayError
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from service.protocol import Lease, Resources
from workers import run_logs
from workers.failures import UnrunnableError
from workers.fleet import capacity as nodes
from workers.fleet.capacity import Placement
from workers.fleet.ray_authentication import ClusterRefusedError, explain_refusal, is_refusal
from workers.fleet.ray_private import find_free_by_node, forward_worker_lines
from workers.fleet.signals import exit_unless_done
from workers.processes import begun_marks, group, single

_OBJECT_STORE_BYTES = 80 * 2**20  # Ray's least is 75 MiB; results are single words
_ANSWER_SECONDS = 8.0
_HEALTH_CHECK_SECONDS = 1.0  # a raylet is dead after five refused; of Ray's own 3 s that takes 15
_SHUTDOWN_SECONDS = 15.0
_NONE = Resources(cpus=0)
_IDLE_SECONDS = 24 * 3600  # keep worker processes warm between runs; Ray's own default is a second


class RayLostError(Exception):
    """Ray's part on this node is dead, or the cluster does not answer: nothing can run any more."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Handle:
    """A submitted run: its future, and what cancels it."""

    ref: Any
    future: Future[Any]
    mark: str | None = None  # by which it says that it has begun; None: it begins at once

    def drain(self) -> None:
        """Ask the run to publish a checkpoint and end; one that has not begun never will."""
        ray.cancel(self.ref)

    def kill(self) -> None:
        """End the run's process."""
        ray.cancel(self.ref, force=True)


class Engine:
    """A connection to Ray."""

    def __init__(self, *, shared: bool) -> None:
        self._is_shared = shared
        self._free_by_node = find_free_by_node() if shared else None
        self._node_id = ray.get_runtime_context().get_node_id()
        self._asking = ThreadPoolExecutor(max_workers=1)

    def nodes(self) -> dict[str, Resources]:
        """Return the whole resources of every node that is alive.

        Raises:
            RayLostError: this node is not among them, or nobody answers.
        """
        alive = nodes.from_ray(self._answer(ray.nodes))
        if self._node_id not in alive:
            raise RayLostError(f"Ray says that node {self._node_id}, which is this one, is dead")
        return alive

    def available(self) -> dict[str, Resources]:
        """Return what no task holds on every node; of our own Ray, all: we know what we placed.

        All as well where this Ray has no such count for every node: see `ray_private`.

        Raises:
            RayLostError: nobody answers.
        """
        if self._free_by_node is None:
            return self.nodes()
        raw = self._answer(self._free_by_node)
        return {node: nodes.resources(free) for node, free in raw.items()}

    def _answer(self, ask: Callable[[], Any]) -> Any:
        try:  # without its GCS, Ray would block for a minute and then abort the process
            return self._asking.submit(ask).result(_ANSWER_SECONDS)
        except (TimeoutError, RayError) as error:
            why = str(error) or f"nothing for {_ANSWER_SECONDS:g} s"
            raise RayLostError(f"Ray does not answer: {why}") from error

    def submit(
        self, lease: Lease, node: str, connection: single.Connection, checkpoint_seconds: float
    ) -> Handle:
        """Start `lease` on `node`.

        Raises:
            UnrunnableError: Ray takes no such resources.
        """
        is_shared = lease.resources.num_processes > 1
        function: Any = group.run_group if is_shared else single.run_lease
        resources = _NONE if is_shared else lease.resources  # Ray Train places the processes
        try:
            run = _on(Placement(node=node, resources=resources), function)
        except ValueError as error:
            raise UnrunnableError(str(error)) from error
        times = {"checkpoint_seconds": checkpoint_seconds, "leased_at": time.time()}
        mark = f"{lease.run_id}/{lease.attempt}" if self._is_shared and not is_shared else None
        more = {"node": node} if is_shared else {"mark": mark}
        ref = run.remote(lease, connection, **times, **more)
        return Handle(ref=ref, future=ref.future(), mark=mark)

    def has_begun(self, handle: Handle) -> bool:
        """Whether a run is out of Ray's queue; on our own Ray nobody takes its place before it.

        Raises:
            RayLostError: nobody answers.
        """
        mark = handle.mark
        return mark is None or self._answer(lambda: begun_marks.has_begun(mark))

    def free_groups(self) -> None:
        """Free what processes hold whose leading task was killed; for when no group runs.

        Ray Train does so itself, but asks the dashboard who is dead, and our own Ray has none.
        """
        if not self._is_shared:
            for name, facts in placement_group_table().items():
                if facts["state"] != "REMOVED":
                    remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(name))))

    def warm_up(self, timeout_seconds: float = 120.0) -> set[int]:
        """Start a worker process per free slot, with kernels loaded; gives the process ids."""
        refs = [
            _on(slot, single.warm_up).remote(device=None if slot.resources.gpus else "cpu")
            for node, free in self.available().items()
            for slot in _slots(node, free)
        ]
        return set(ray.get(refs, timeout=timeout_seconds))


def _slots(node: str, total: Resources) -> list[Placement]:
    """One slot per CPU; the GPUs are spread over the first."""
    shares = [min(1.0, max(0.0, total.gpus - cpu)) for cpu in range(total.cpus)]
    return [Placement(node=node, resources=Resources(cpus=1, gpus=gpus)) for gpus in shares]


def _on(placement: Placement, function: Any) -> Any:
    remote: Any = ray.remote  # its types know neither this strategy nor functions given later
    return remote(
        num_cpus=placement.resources.cpus,
        num_gpus=placement.resources.gpus,
        max_retries=0,
        max_calls=0,  # with GPUs Ray would otherwise end the process after every task
        scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=placement.node, soft=False),
    )(function)


@contextlib.contextmanager
def local(*, cpus: int | None = None, gpus: int | None = None) -> Generator[Engine]:
    """Start a Ray of our own on this machine, for as long as the context lasts."""
    ray.init(
        address="local",  # whatever RAY_ADDRESS says
        num_cpus=None if cpus is None else min(cpus, _num_cpus()),
        num_gpus=gpus,
        object_store_memory=_OBJECT_STORE_BYTES,
        include_dashboard=False,
        log_to_driver=True,
        logging_level=logging.ERROR,
        _system_config={
            "idle_worker_killing_time_threshold_ms": _IDLE_SECONDS * 1000,
            "health_check_period_ms": int(_HEALTH_CHECK_SECONDS * 1000),
        },
    )
    forward_worker_lines(run_logs.forward_lines)
    with _shutting_down():
        yield Engine(shared=False)


def _num_cpus() -> int:
    has_affinity = hasattr(os, "sched_getaffinity")  # macOS has not
    return len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1


@contextlib.contextmanager
def cluster(address: str) -> Generator[Engine]:
    """Join the Ray cluster at `address`, from inside its network.

    Raises:
        ClusterRefusedError: the cluster asks for a token that this process does not have.
    """
    try:
        ray.init(address=address, log_to_driver=True, logging_level=logging.ERROR)
    except (ConnectionError, AuthenticationError) as error:
        if not is_refusal(error):
            raise
        raise ClusterRefusedError(explain_refusal(address)) from error
    forward_worker_lines(run_logs.forward_lines)
    with _shutting_down():
        yield Engine(shared=True)


@contextlib.contextmanager
def _shutting_down() -> Generator[None]:
    try:
        yield
    finally:
        watch = exit_unless_done(_SHUTDOWN_SECONDS, code=1)
        ray.shutdown()
        watch.cancel()
