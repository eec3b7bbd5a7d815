"""The connection of a fleet to Ray: nodes, free resources, tasks.

Set the environment of `workers.fleet.ray_environment` before importing this module.

A run is a Ray task, not an actor. The tasks of a killed fleet end with the fleet, while detached
actors would go on training. `max_retries=0`: only the service decides about retries.
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
from ray import PlacementGroupID  # names a placement group that another process made
from ray.exceptions import AuthenticationError, RayError
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from service.protocol import Lease, Resources
from workers import run_logs
from workers.failures import UnrunnableError
from workers.fleet.capacity import Placement, read_nodes, read_resources
from workers.fleet.ray_authentication import ClusterRefusedError, explain_refusal, is_refusal
from workers.fleet.ray_private import find_free_by_node, forward_worker_lines
from workers.fleet.signals import exit_unless_done
from workers.processes import begun_marks, group, single

_OBJECT_STORE_BYTES = 80 * 2**20  # Ray needs 75 MiB; the results of our tasks are single words
_ANSWER_SECONDS = 8.0
# Ray declares a raylet dead after five failed checks: 5 s, with Ray's default of 3 s 15 s.
_HEALTH_CHECK_SECONDS = 1.0
_SHUTDOWN_SECONDS = 15.0
_NONE = Resources(cpus=0)
_IDLE_SECONDS = 24 * 3600  # keep worker processes warm between runs; Ray's default is 1 s


class RayLostError(Exception):
    """The raylet of this node is dead, or the cluster does not answer: no run can go on."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Handle:
    """A submitted run: its result as a future, and its cancellation."""

    ref: Any
    future: Future[Any]
    mark: str | None = None  # shows that the task has begun; None: it begins at once

    def drain(self) -> None:
        """Ask the run to publish a checkpoint and return. A task in Ray's queue is removed."""
        ray.cancel(self.ref)

    def kill(self) -> None:
        """Kill the process of the run."""
        ray.cancel(self.ref, force=True)


class Engine:
    """A connection to Ray."""

    def __init__(self, *, is_cluster: bool) -> None:
        self._is_cluster = is_cluster
        self._free_by_node = find_free_by_node() if is_cluster else None
        self._node_id = ray.get_runtime_context().get_node_id()
        self._asking = ThreadPoolExecutor(max_workers=1)

    def list_nodes(self) -> dict[str, Resources]:
        """Return the total resources of every living node.

        Raises:
            RayLostError: this node is not among them, or Ray does not answer.
        """
        alive = read_nodes(self._ask_ray(ray.nodes))
        if self._node_id not in alive:
            raise RayLostError(f"Ray reports that this node ({self._node_id}) is dead")
        return alive

    def list_free(self) -> dict[str, Resources]:
        """Return the resources of every node that no task holds, as Ray counts them.

        Return the total on a local Ray, whose tasks are all ours, and on a Ray without a count for
        each node (see `ray_private`).

        Raises:
            RayLostError: Ray does not answer.
        """
        if self._free_by_node is None:
            return self.list_nodes()
        raw = self._ask_ray(self._free_by_node)
        return {node: read_resources(free) for node, free in raw.items()}

    def _ask_ray(self, ask: Callable[[], Any]) -> Any:
        # In a thread: when Ray's GCS is dead, Ray blocks for a minute and then aborts the process.
        try:
            return self._asking.submit(ask).result(_ANSWER_SECONDS)
        except (TimeoutError, RayError) as error:
            reason = str(error) or f"nothing for {_ANSWER_SECONDS:g} s"
            raise RayLostError(f"Ray does not answer: {reason}") from error

    def submit_lease(
        self, lease: Lease, node: str, connection: single.Connection, checkpoint_seconds: float
    ) -> Handle:
        """Start `lease` on `node`.

        Raises:
            UnrunnableError: Ray refuses the resources.
        """
        is_group = lease.resources.num_processes > 1
        function: Any = group.run_group if is_group else single.run_lease
        resources = _NONE if is_group else lease.resources  # Ray Train places the processes
        try:
            run = _make_remote(Placement(node=node, resources=resources), function)
        except ValueError as error:
            raise UnrunnableError(str(error)) from error
        times = {"checkpoint_seconds": checkpoint_seconds, "leased_at": time.time()}
        mark = f"{lease.run_id}/{lease.attempt}" if self._is_cluster and not is_group else None
        more = {"node": node} if is_group else {"mark": mark}
        ref = run.remote(lease, connection, **times, **more)
        return Handle(ref=ref, future=ref.future(), mark=mark)

    def has_begun(self, handle: Handle) -> bool:
        """Return whether a run has left Ray's queue; on a local Ray no run has to wait there.

        Raises:
            RayLostError: Ray does not answer.
        """
        mark = handle.mark
        return mark is None or self._ask_ray(lambda: begun_marks.has_begun(mark))

    def free_groups(self) -> None:
        """Free the resources of groups whose leading task was killed; no group may be running.

        Ray Train would free them too, but asks the dashboard for dead tasks. A local Ray has none.
        """
        if not self._is_cluster:
            for name, facts in placement_group_table().items():
                if facts["state"] != "REMOVED":
                    remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(name))))

    def warm_up(self, timeout_seconds: float = 120.0) -> set[int]:
        """Start a warm worker process for each free slot; return the process ids."""
        refs = [
            _make_remote(slot, single.warm_up).remote(device=None if slot.resources.gpus else "cpu")
            for node, free in self.list_free().items()
            for slot in _list_slots(node, free)
        ]
        return set(ray.get(refs, timeout=timeout_seconds))


def _list_slots(node: str, total: Resources) -> list[Placement]:
    """Return a slot for each CPU; the first slots get the GPUs, at most 1 each."""
    # 4 CPUs and 1.5 GPUs give the GPU shares 1, 0.5, 0, 0.
    shares = [min(1.0, max(0.0, total.gpus - cpu)) for cpu in range(total.cpus)]
    return [Placement(node=node, resources=Resources(cpus=1, gpus=gpus)) for gpus in shares]


def _make_remote(placement: Placement, function: Any) -> Any:
    remote: Any = ray.remote  # the types of Ray lack this strategy and a function given later
    return remote(
        num_cpus=placement.resources.cpus,
        num_gpus=placement.resources.gpus,
        max_retries=0,
        max_calls=0,  # by default Ray ends a process with a GPU after every task
        scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=placement.node, soft=False),
    )(function)


@contextlib.contextmanager
def start_local(*, cpus: int | None = None, gpus: int | None = None) -> Generator[Engine]:
    """Start a local Ray, stop it when the context ends, and yield the connection."""
    ray.init(
        address="local",  # ignores RAY_ADDRESS
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
    with _shut_down_afterwards():
        yield Engine(is_cluster=False)


def _num_cpus() -> int:
    has_affinity = hasattr(os, "sched_getaffinity")  # not on macOS
    return len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1


@contextlib.contextmanager
def join_cluster(address: str) -> Generator[Engine]:
    """Join the Ray cluster at `address`, from inside its network; yield the connection.

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
    with _shut_down_afterwards():
        yield Engine(is_cluster=True)


@contextlib.contextmanager
def _shut_down_afterwards() -> Generator[None]:
    try:
        yield
    finally:
        watch = exit_unless_done(_SHUTDOWN_SECONDS, code=1)
        ray.shutdown()
        watch.cancel()
