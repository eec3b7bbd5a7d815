"""Requests that are served together, first come first served. Pure: no database, no clock."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from sqlalchemy import ColumnElement

from service.access.caller import Caller
from service.database.tables import Study
from service.protocol import Lease, LeaseRequest, Resources, RunKind


@dataclass(kw_only=True)
class PendingRequest:
    """A request for leases, and what it was given so far."""

    caller: Caller
    request: LeaseRequest
    within: ColumnElement[bool] | None = None  # the studies it takes from; None: not looked up yet
    scope: str | None = None  # names `within`
    granted: list[Lease] = field(default_factory=list[Lease])
    error: Exception | None = None
    gone: bool = False  # answered, or its client has left: another thread may find it at any time

    @property
    def wanted(self) -> int:
        """Runs that may still be granted."""
        return 0 if self.error or self.gone else self.request.max_runs - len(self.granted)

    @property
    def free(self) -> Resources:
        """What the runs that were granted leave free."""
        free = self.request.resources
        for lease in self.granted:
            free = free.subtract(lease.resources)
        return free

    def takes(self, kind: RunKind) -> bool:
        """Whether it asks for runs of this kind."""
        return self.request.kinds is None or kind in self.request.kinds


@dataclass(kw_only=True)
class OpenStudy:
    """A study that may start so many trials, and what each of them needs."""

    study: Study
    room: int
    needs: Resources


def assign_trials(
    bids: Iterable[PendingRequest],
    openings: Mapping[str, OpenStudy],
    studies: Mapping[str | None, Iterable[str]],
) -> dict[str, list[PendingRequest]]:
    """Who gets a trial of which study, once for each trial; no study beyond its room.

    Every bid in its turn takes what fits it from the first of its scope's `studies` with room.
    """
    allotted: dict[str, list[PendingRequest]] = {}
    room = {study: opening.room for study, opening in openings.items()}
    for bid in bids:
        free, wanted = bid.free, bid.wanted if bid.takes("trial") else 0
        for study in studies[bid.scope]:
            needs = openings[study].needs
            while wanted and room[study] > 0 and needs.fits(free):
                allotted.setdefault(study, []).append(bid)
                free, wanted, room[study] = free.subtract(needs), wanted - 1, room[study] - 1
    return allotted
