"""Lease requests that a round serves together, in order of arrival. Pure: no database, no clock."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from sqlalchemy import ColumnElement

from service.access.caller import Caller
from service.database.tables import Study
from service.protocol import Lease, LeaseRequest, Resources, RunKind


@dataclass(kw_only=True)
class PendingRequest:
    """A request for leases, and the leases that it has been granted."""

    caller: Caller
    request: LeaseRequest
    study_filter: ColumnElement[bool] | None = None  # None until a round has found it
    scope: str | None = None  # a name for `study_filter`, the same for equal filters
    granted: list[Lease] = field(default_factory=list[Lease])
    error: Exception | None = None
    # The request was answered, or its client has left. The event loop sets this while a round runs
    # in another thread.
    is_closed: bool = False

    @property
    def num_wanted(self) -> int:
        """Number of runs that may still be granted."""
        if self.error or self.is_closed:
            return 0
        return self.request.max_runs - len(self.granted)

    @property
    def free_resources(self) -> Resources:
        """CPUs and GPUs that the granted runs leave free."""
        free = self.request.resources
        for lease in self.granted:
            free = free.subtract(lease.resources)
        return free

    def accepts(self, kind: RunKind) -> bool:
        """Return whether the request asks for runs of this kind."""
        return self.request.kinds is None or kind in self.request.kinds


@dataclass(kw_only=True)
class OpenStudy:
    """A study that may start `room` more trials; each needs the resources `needs`."""

    study: Study
    room: int
    needs: Resources


@dataclass(frozen=True)
class Granted:
    """A step of a round: some of its requests were granted runs and can be answered now."""


@dataclass(frozen=True, kw_only=True)
class RoundEnd:
    """The end of a round. `due_seconds`: until a retry or an expiry is due; None: neither is."""

    due_seconds: float | None


def assign_trials(
    requests: Iterable[PendingRequest],
    open_studies: Mapping[str, OpenStudy],
    studies_of_scope: Mapping[str | None, Iterable[str]],
) -> dict[str, list[PendingRequest]]:
    """Return the requests that get a trial of each study, by the study's id.

    A request is listed once for each trial. No study is given more trials than its room.
    """
    # Example: study A has room for 2 trials of 1 CPU, study B for 1 trial of 4 CPUs. The requests
    # are r1 (3 runs, 4 CPUs) and r2 (1 run, 8 CPUs). r1 takes both trials of A, and its 2 free CPUs
    # do not fit B. r2 then gets the trial of B: {A: [r1, r1], B: [r2]}.
    assigned: dict[str, list[PendingRequest]] = {}
    room = {study: opening.room for study, opening in open_studies.items()}
    for pending in requests:
        free = pending.free_resources
        num_wanted = pending.num_wanted if pending.accepts("trial") else 0
        for study in studies_of_scope[pending.scope]:
            needs = open_studies[study].needs
            while num_wanted and room[study] > 0 and needs.fits(free):
                assigned.setdefault(study, []).append(pending)
                free, num_wanted, room[study] = (
                    free.subtract(needs),
                    num_wanted - 1,
                    room[study] - 1,
                )
    return assigned
