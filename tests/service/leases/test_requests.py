"""Who gets a trial of which study: first come first served, and nobody beyond what there is."""

from hypothesis import given, settings
from hypothesis import strategies as st

from service.database.tables import Study
from service.leases.requests import OpenStudy, PendingRequest, assign_trials
from service.protocol import LeaseRequest, Resources
from tests.by_hand import EVERYWHERE

STUDIES = ("st_a", "st_b", "st_c")

openings = st.dictionaries(
    st.sampled_from(STUDIES),
    st.builds(
        lambda room, cpus: OpenStudy(study=Study(), room=room, needs=Resources(cpus=cpus)),
        st.integers(1, 5),
        st.integers(1, 4),
    ),
)
bids = st.lists(
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


def studies_of(openings):
    return {None: list(openings)} | {s: [s] if s in openings else [] for s in STUDIES}


def served(allotted, bid):
    return [study for study, takers in allotted.items() for taker in takers if taker is bid]


def fits(bid, needs, taken):
    return sum(n.cpus for n in taken) + needs.cpus <= bid.request.resources.cpus


@settings(deadline=None)
@given(bids, openings)
def test_no_study_gives_more_than_its_room_and_no_bid_takes_more_than_it_asked_for(bids, openings):
    allotted = assign_trials(bids, openings, studies_of(openings))
    for study, takers in allotted.items():
        assert 0 < len(takers) <= openings[study].room
    for bid in bids:
        taken = served(allotted, bid)
        assert len(taken) <= bid.request.max_runs
        assert sum(openings[s].needs.cpus for s in taken) <= bid.request.resources.cpus
        assert set(taken) <= set(studies_of(openings)[bid.scope])
        if taken:
            assert not bid.is_closed
            assert bid.request.kinds != ("target",)


@settings(deadline=None)
@given(bids, openings)
def test_what_stays_open_fits_nobody_who_wants_more(bids, openings):
    allotted = assign_trials(bids, openings, studies_of(openings))
    for bid in bids:
        if not bid.accepts("trial") or bid.is_closed:
            continue
        taken = served(allotted, bid)
        for study in studies_of(openings)[bid.scope]:
            left = openings[study].room - len(allotted.get(study, ()))
            full = len(taken) == bid.request.max_runs
            needs = [openings[s].needs for s in taken]
            assert not left or full or not fits(bid, openings[study].needs, needs)


@settings(deadline=None)
@given(bids, openings)
def test_who_comes_first_is_served_as_if_nobody_came_after(bids, openings):
    allotted = assign_trials(bids, openings, studies_of(openings))
    for n in range(len(bids)):
        alone = assign_trials(bids[: n + 1], openings, studies_of(openings))
        assert served(alone, bids[n]) == served(allotted, bids[n])
