"""Trials are assigned to requests in order of arrival, within the room of each study."""

from hypothesis import given, settings
from hypothesis import strategies as st

from service.database.tables import Study
from service.leases.requests import OpenStudy, PendingRequest, assign_trials
from service.protocol import LeaseRequest, Resources
from tests.by_hand import EVERYWHERE

STUDIES = ("st_a", "st_b", "st_c")

open_studies = st.dictionaries(
    st.sampled_from(STUDIES),
    st.builds(
        lambda room, cpus: OpenStudy(study=Study(), room=room, needs=Resources(cpus=cpus)),
        st.integers(1, 5),
        st.integers(1, 4),
    ),
)
requests = st.lists(
    st.builds(
        lambda runs, cpus, kinds, scope, is_closed: PendingRequest(
            caller=EVERYWHERE,
            request=LeaseRequest(
                worker="w", max_runs=runs, resources=Resources(cpus=cpus), kinds=kinds
            ),
            scope=scope,
            is_closed=is_closed,
        ),
        st.integers(1, 4),
        st.integers(0, 8),
        st.sampled_from([None, ("trial",), ("target",)]),
        st.sampled_from([None, *STUDIES]),
        st.sampled_from([False, False, True]),
    ),
    max_size=8,
)


def studies_of(open_studies):
    return {None: list(open_studies)} | {s: [s] if s in open_studies else [] for s in STUDIES}


def served(assigned, pending):
    return [study for study, takers in assigned.items() for taker in takers if taker is pending]


def fits(pending, needs, taken):
    return sum(n.cpus for n in taken) + needs.cpus <= pending.request.resources.cpus


@settings(deadline=None)
@given(requests, open_studies)
def test_no_study_gives_more_than_its_room_and_no_bid_takes_more_than_it_asked_for(
    requests, open_studies
):
    assigned = assign_trials(requests, open_studies, studies_of(open_studies))
    for study, takers in assigned.items():
        assert 0 < len(takers) <= open_studies[study].room
    for pending in requests:
        taken = served(assigned, pending)
        assert len(taken) <= pending.request.max_runs
        assert sum(open_studies[s].needs.cpus for s in taken) <= pending.request.resources.cpus
        assert set(taken) <= set(studies_of(open_studies)[pending.scope])
        if taken:
            assert not pending.is_closed
            assert pending.request.kinds != ("target",)


@settings(deadline=None)
@given(requests, open_studies)
def test_what_stays_open_fits_nobody_who_wants_more(requests, open_studies):
    assigned = assign_trials(requests, open_studies, studies_of(open_studies))
    # A study with room left has no trial that fits a request which wants more.
    for pending in requests:
        if not pending.accepts("trial") or pending.is_closed:
            continue
        taken = served(assigned, pending)
        for study in studies_of(open_studies)[pending.scope]:
            left = open_studies[study].room - len(assigned.get(study, ()))
            full = len(taken) == pending.request.max_runs
            needs = [open_studies[s].needs for s in taken]
            assert not left or full or not fits(pending, open_studies[study].needs, needs)


@settings(deadline=None)
@given(requests, open_studies)
def test_who_comes_first_is_served_as_if_nobody_came_after(requests, open_studies):
    assigned = assign_trials(requests, open_studies, studies_of(open_studies))
    # Later requests take nothing from the first n + 1.
    for n in range(len(requests)):
        alone = assign_trials(requests[: n + 1], open_studies, studies_of(open_studies))
        assert served(alone, requests[n]) == served(assigned, requests[n])
