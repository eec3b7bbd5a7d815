"""Which node has room for what: the runs that this fleet placed, and what others leave free.

A run goes to one node, so a fleet offers the service one node's free resources at a time; the
sum over nodes would lease runs that fit nowhere and whose leases then expire in Ray's queue.
"""

import math
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass

from service.protocol import Resources

# Ray's own count follows a task's start or end by 0.1 s (measured on one machine).
_SETTLED_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True)
class Placement:
    """A run's resources on the node that carries it."""

    node: str
    resources: Resources


_NOTHING = Resources(cpus=0)


class Nodes:
    """Free resources by node; nodes may come and go while runs are placed on them."""

    def __init__(self) -> None:
        self._total: dict[str, Resources] = {}
        self._available: dict[str, Resources] = {}
        self._placed: dict[Hashable, Placement] = {}
        self._unsettled: dict[Hashable, float] = {}
        self._turn = 0

    def update_nodes(
        self, total: Mapping[str, Resources], available: Mapping[str, Resources], *, now: float
    ) -> None:
        """Take the nodes that are alive, their whole resources, and what Ray says is free."""
        self._total, self._available = dict(total), dict(available)
        since = now - _SETTLED_SECONDS
        self._unsettled = {run: at for run, at in self._unsettled.items() if at > since}

    def place_run(self, run: Hashable, placement: Placement, *, now: float) -> None:
        """Count `run` where it is placed."""
        self._placed[run], self._unsettled[run] = placement, now

    def remove_run(self, run: Hashable) -> None:
        """Give back what `run` had."""
        del self._placed[run]
        self._unsettled.pop(run, None)

    def next_offer(self) -> Placement | None:
        """Return what is free on the next node in turn that has anything free."""
        offers = [Placement(node=node, resources=self.free_on(node)) for node in self._total]
        offers = [offer for offer in offers if offer.resources.cpus or offer.resources.gpus]
        self._turn += 1
        return offers[self._turn % len(offers)] if offers else None

    def free_on(self, node: str) -> Resources:
        """Return what is free on `node` by our count and by Ray's; never less than nothing.

        Ray counts others' work as well, ours late: what was placed just now, it may count as free.
        """
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


def from_ray(nodes: Iterable[Mapping[str, object]]) -> dict[str, Resources]:
    """Read `ray.nodes()`: id to resources of those alive."""
    alive = [node for node in nodes if node["Alive"]]
    return {str(node["NodeID"]): resources(node["Resources"]) for node in alive}


def resources(raw: object) -> Resources:
    """Read resources as Ray names them; what is used up it leaves out."""
    assert isinstance(raw, Mapping)
    return Resources(cpus=int(raw.get("CPU", 0)), gpus=_round_gpus(raw.get("GPU", 0.0)))


def _round_gpus(gpus: float) -> float:
    """Round as the protocol wants it: whole above one, a rest has its turn once those are taken."""
    exact = round(gpus, 4)  # Ray counts in ten-thousandths; 1 - 0.9 must be 0.1
    return exact if exact <= 1 else float(math.floor(exact))
