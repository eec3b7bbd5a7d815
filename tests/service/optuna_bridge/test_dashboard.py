"""The dashboard shows the studies of the key's project, and saves notes of its own pages alone."""

import re

import httpx
import pytest

from service.access import keys


@pytest.fixture
def api(shared_api):
    return shared_api


def key_of(api, project, *scopes):
    """Create a key of the project, with the scopes read and write by default."""
    with api.sessions.begin() as session:
        return keys.create_key(session, "test", list(scopes or ["read", "write"]), project=project)[
            1
        ]


@pytest.fixture
def made(api, study_spec):
    """Create a study in each of two projects; yield their ids in Optuna, and their common name."""
    spec, numbers = study_spec(), {}
    for project in ("a", "b"):
        api.client.request("POST", "/v1/studies", body=spec, params={"project": project})
        storage = api.sampler.storage
        numbers[project] = storage.get_study_id_from_name(f"{project}/{spec['name']}")
    yield numbers, spec["name"]
    for project in ("a", "b"):
        path = f"/v1/studies/{spec['name']}/cancel"
        api.client.request("POST", path, params={"project": project})


def get(api, path, key):
    return httpx.get(f"{api.url}{path}", auth=("any", key))


def test_a_key_of_a_project_sees_its_studies_in_the_list_and_an_admin_all(api, made):
    _, name = made
    own = get(api, "/api/studies", key_of(api, "a")).json()["study_summaries"]
    assert {study["study_name"].partition("/")[0] for study in own} == {"a"}
    every = {s["study_name"] for s in get(api, "/api/studies", api.key).json()["study_summaries"]}
    assert {f"a/{name}", f"b/{name}"} <= every


@pytest.mark.parametrize(
    "path", ["/api/studies/{}", "/api/studies/{}/param_importances", "/csv/{}", "/api/studies/{}/",
             "/api/studies/{}/plot/slice"]
)  # fmt: skip
def test_what_shows_a_study_of_another_project_is_not_there(api, made, path):
    numbers, _ = made
    key = key_of(api, "a")
    # The admin's request puts the study into the dashboard's cache.
    get(api, path.format(numbers["b"]), api.key)
    # A foreign study and a missing study must give the same response.
    foreign = get(api, path.format(numbers["b"]), key)
    nowhere = get(api, path.format(10**9), key)
    assert (foreign.status_code, nowhere.status_code) == (404, 404)
    assert foreign.text == nowhere.text
    assert get(api, path.format(numbers["a"]), key).status_code != 404


def test_every_route_of_the_dashboard_is_a_page_of_a_study_or_closed(api):
    """A newer dashboard can have new routes; they must stay closed until a maintainer adds them."""
    from service.optuna_bridge import dashboard

    bottle = api.sampler.make_dashboard(lambda _: True)
    reads = [r.rule for r in bottle.routes if r.method == "GET"]
    closed = {rule for rule in reads if not is_let_through(dashboard, rule)}
    assert len(reads) > 8
    assert closed <= {r for r in reads if r.startswith(("/artifacts", "/incompatible"))}, closed


def is_let_through(dashboard, rule):
    path = re.sub(r"<:re:.*>$", "", re.sub(r"<\w+(:int)?>", "1", rule)).replace(
        "<filename:path>", "x.js"
    )
    return bool(dashboard._PAGES.fullmatch(path) or dashboard._STUDY_PAGES.fullmatch(path))


NOTE = {"version": 1, "body": "seen"}


def note(api, key, number, **headers):
    path = f"{api.url}/api/studies/{number}/note"
    return httpx.put(path, json=NOTE, auth=("any", key), headers=headers)


def test_a_note_is_taken_from_our_own_page_and_from_no_other_site(api, made):
    numbers, _ = made
    key = key_of(api, "a")
    # Without an Origin, or with another site's, a browser may act for a foreign page.
    for headers in ({}, {"Origin": "https://evil.example"}, {"Origin": "null"}):
        assert note(api, key, numbers["a"], **headers).status_code == 403
    assert note(api, key, numbers["a"], Origin=api.url).status_code == 204


def test_a_note_on_another_projects_study_is_not_taken(api, made):
    numbers, _ = made
    assert note(api, key_of(api, "a"), numbers["b"], Origin=api.url).status_code == 404


def test_a_fleet_or_scraper_key_opens_no_dashboard(api):
    for scope in ("work", "metrics"):
        assert get(api, "/api/studies", key_of(api, None, scope)).status_code == 403
