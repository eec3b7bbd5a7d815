"""Which node has room for what: plain accounting of the runs that this fleet placed.

A run goes to one node, so a fleet offers the service one node's free resources at a time; the
sum over nodes would lease runs that fit nowhere and whose leases then expire in Ray's queue.
"""

import math
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass

from service.protocol import Resources


@dataclass(frozen=True, kw_only=True)
class Placement:
    """A run's resources on the node that carries it."""

    node: str
    resources: Resources


class Nodes:
    """Free resources by node; nodes may come and go while runs are placed on them."""

    def __init__(self) -> None:
        self._total: dict[str, Resources] = {}
        self._placed: dict[Hashable, Placement] = {}
        self._turn = 0

    def update(self, total: Mapping[str, Resources]) -> None:
        """Take the nodes that are alive now and their whole resources."""
        self._total = dict(total)

    def place(self, run: Hashable, placement: Placement) -> None:
        """Count `run` where it is placed."""
        self._placed[run] = placement

    def remove(self, run: Hashable) -> None:
        """Give back what `run` had."""
        del self._placed[run]

    def offer(self) -> Placement | None:
        """Return what is free on the next node in turn that has anything free."""
        offers = [Placement(node=node, resources=self.free(node)) for node in self._total]
        offers = [offer for offer in offers if offer.resources.cpus or offer.resources.gpus]
        self._turn += 1
        return offers[self._turn % len(offers)] if offers else None

    def free(self, node: str) -> Resources:
        """Return what is free on `node`; never less than nothing."""
        total = self._total[node]
        used = [p.resources for p in self._placed.values() if p.node == node]
        return Resources(
            cpus=max(0, total.cpus - sum(r.cpus for r in used)),
            gpus=_offered(max(0.0, total.gpus - sum(r.gpus for r in used))),
        )


def from_ray(nodes: Iterable[Mapping[str, object]]) -> dict[str, Resources]:
    """Read `ray.nodes()`: id to resources of those alive."""
    alive = [node for node in nodes if node["Alive"]]
    return {str(node["NodeID"]): _resources(node["Resources"]) for node in alive}


def _resources(raw: object) -> Resources:
    assert isinstance(raw, Mapping)
    return Resources(cpus=int(raw.get("CPU", 0)), gpus=_offered(raw.get("GPU", 0.0)))


def _offered(gpus: float) -> float:
    """Round as the protocol wants it: whole above one, a rest has its turn once those are taken."""
    exact = round(gpus, 4)  # Ray counts in ten-thousandths; 1 - 0.9 must be 0.1
    return exact if exact <= 1 else float(math.floor(exact))
