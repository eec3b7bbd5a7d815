"""Free resources of each node: the total, less the runs of this fleet and the tasks of others.

A run needs a single node, so a fleet offers the free resources of a single node at a time. With
the sum over nodes the service would lease runs that fit on no node, and their leases would expire
in Ray's queue.
"""

import math
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass

from service.protocol import Resources

# Ray counts a task's start or end 0.1 s late (measured on our machine).
_SETTLED_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Resources of a run, and the node that runs it."""

    node: str
    resources: Resources


_NOTHING = Resources(cpus=0)


class Nodes:
    """Free resources by node. Nodes may join and leave while runs are placed on them."""

    def __init__(self) -> None:
        self._total: dict[str, Resources] = {}
        self._available: dict[str, Resources] = {}
        self._placed: dict[Hashable, Placement] = {}
        self._unsettled: dict[Hashable, float] = {}
        self._turn = 0

    def update_nodes(
        self, total: Mapping[str, Resources], available: Mapping[str, Resources], *, now: float
    ) -> None:
        """Replace the total and the available resources of living nodes by Ray's figures."""
        self._total, self._available = dict(total), dict(available)
        since = now - _SETTLED_SECONDS
        self._unsettled = {run: at for run, at in self._unsettled.items() if at > since}

    def place_run(self, run: Hashable, placement: Placement, *, now: float) -> None:
        """Count the resources of `run` as used."""
        self._placed[run], self._unsettled[run] = placement, now

    def remove_run(self, run: Hashable) -> None:
        """Count the resources of `run` as free."""
        del self._placed[run]
        self._unsettled.pop(run, None)

    def next_offer(self) -> Placement | None:
        """Return the free resources of the next node with any, in turn; None if all are busy."""
        offers = [Placement(node=node, resources=self.free_on(node)) for node in self._total]
        offers = [offer for offer in offers if offer.resources.cpus or offer.resources.gpus]
        self._turn += 1
        return offers[self._turn % len(offers)] if offers else None

    def free_on(self, node: str) -> Resources:
        """Return the free resources of `node` by our count and by Ray's, at least 0.

        Ray counts tasks of other drivers too, but counts a new task of ours late.
        """
        # Example: a node of 8 CPUs. Another driver uses 4, so Ray reports 4 free. We placed a run
        # of 2 CPUs 0.05 s ago, which Ray has not counted: free is min(8 - 2, 4 - 2) = 2. After a
        # second Ray reports 2 free with our run counted: min(8 - 2, 2) = 2.
        total, available = self._total[node], self._available.get(node, _NOTHING)
        ours = {run: p.resources for run, p in self._placed.items() if p.node == node}
        late = [resources for run, resources in ours.items() if run in self._unsettled]
        cpus = (
            total.cpus - sum(r.cpus for r in ours.values()),
            available.cpus - sum(r.cpus for r in late),
        )
        gpus = (
            total.gpus - sum(r.gpus for r in ours.values()),
            available.gpus - sum(r.gpus for r in late),
        )
        return Resources(cpus=max(0, min(cpus)), gpus=_round_gpus(max(0.0, min(gpus))))


def read_nodes(nodes: Iterable[Mapping[str, object]]) -> dict[str, Resources]:
    """Return the resources of each living node by its id, from the result of `ray.nodes()`."""
    alive = [node for node in nodes if node["Alive"]]
    return {str(node["NodeID"]): read_resources(node["Resources"]) for node in alive}


def read_resources(raw: object) -> Resources:
    """Read resources under Ray's names. Ray leaves out a resource that is used up."""
    assert isinstance(raw, Mapping)
    return Resources(cpus=int(raw.get("CPU", 0)), gpus=_round_gpus(raw.get("GPU", 0.0)))


def _round_gpus(gpus: float) -> float:
    """Round to the GPUs that the protocol allows: a whole number above 1, any fraction below."""
    # With 2.5 GPUs free the fleet offers 2. Once a run has these, it offers the remaining 0.5.
    exact = round(gpus, 4)  # Ray counts in ten-thousandths; 1 - 0.9 must be 0.1
    return exact if exact <= 1 else float(math.floor(exact))
