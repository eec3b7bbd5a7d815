"""Projects: on every route, a key sees its own project only, and no id reveals another."""

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import func, select, update
from sqlalchemy.exc import IntegrityError

from service.access import keys
from service.access.caller import Caller
from service.client import Client, ServiceError
from service.database.tables import ApiKey, Run, Study
from service.protocol import PROJECT_PATTERN
from tests.by_hand import Worker

SCOPES = ("read", "write", "work")
# Load balancers call the probes without a key.
EXEMPT = {"/healthz", "/readyz"}


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


def make_key(api, scopes=SCOPES, project="a"):
    with api.sessions.begin() as session:
        return keys.create_key(session, "test", list(scopes), project=project)[1]


@pytest.fixture
def client_of(api):
    opened = []

    def make(scopes=SCOPES, project="a"):
        opened.append(Client(api.url, make_key(api, scopes, project), patience_seconds=2))
        return opened[-1]

    yield make
    for client in opened:
        client.close()


@pytest.fixture
def filled(api, client_of, study_spec):
    """Project b with a study: a finished and a leased trial, a checkpoint, events, a curve."""
    b = client_of(project="b")
    hpo = {"trials": 9, "parallel": 9, "sampler": "random", "pruner": "none"}
    spec = study_spec(name="ours", hpo=hpo)
    study = b.post("/v1/studies", spec, idempotency_key="once")
    worker = Worker(b)
    done, leased = worker.lease(2)
    worker.evaluate(done, evaluation=1, loss=2.0)
    worker.complete(done)
    return {"client": b, "spec": spec, "study": study, "done": done, "leased": leased}


BODIES = {
    "/v1/studies/{study}/trials": {"params": {"lr": 0.01}},
    "/v1/studies/{study}/targets": {"target": {"width": 64}},
    "/v1/runs/{run_id}/checkpoints": {
        "step": 1, "tokens": 1, "uri": "x", "hash": "0" * 64, "num_bytes": 1},
    "/v1/runs/{run_id}/finish": {"outcome": "released"},
}  # fmt: skip


def list_calls(api):
    for path, methods in api.app.openapi()["paths"].items():
        for method in methods:
            yield method.upper(), path


def calls_with_ids(api):
    return [(method, path) for method, path in list_calls(api) if "{" in path]


def send(api, method, path, key, filled, study=None):
    """Call a route about an object of project b, with valid ids, lease token and body."""
    names = {"study": study or filled["study"]["id"], "run_id": filled["leased"].run_id}
    headers = bearer(key) | {"Lease-Token": filled["leased"].lease_token}
    url = f"{api.url}{path.format(**names)}"
    return httpx.request(method, url, json=BODIES.get(path, {}), headers=headers)


def text_without_id(answer):
    """The text of an answer without the id of its request."""
    return answer.text.replace(answer.headers["X-Request-ID"], "")


def snapshot(api):
    """The rows that a caller of another project must not change."""
    with api.sessions() as session:
        studies = session.execute(select(Study.id, Study.state, Study.project)).all()
        runs = session.execute(select(Run.id, Run.state, Run.step, Run.lease_expires_at)).all()
    return sorted(map(tuple, studies)), sorted(map(tuple, runs))


def test_no_route_shows_or_changes_a_thing_of_another_project(api, filled):
    foreign = make_key(api, project="a")
    before = snapshot(api)
    routes = calls_with_ids(api)
    assert len(routes) > 15
    for method, path in routes:
        for study in (filled["study"]["id"], filled["study"]["name"]):
            answer = send(api, method, path, foreign, filled, study)
            assert answer.status_code == 404, (method, path, answer.text)
    assert snapshot(api) == before


def test_the_walk_reaches_what_is_there_with_a_key_of_its_own_project(api, filled):
    """Control: the same calls with a key of project b are not answered with 404."""
    own = make_key(api, project="b")
    routes = [(m, p) for m, p in calls_with_ids(api) if not p.endswith("/events")]
    # The calls that end the study or the run come last.
    for method, path in sorted(routes, key=lambda route: route[1].endswith(("cancel", "finish"))):
        answer = send(api, method, path, own, filled)
        assert answer.status_code != 404, (method, path, answer.text)


def test_every_route_has_a_scope_or_is_on_the_list_of_exceptions(api):
    for method, path in list_calls(api):
        answer = httpx.request(method, f"{api.url}{path.format(study='x', run_id='x')}", json={})
        assert (answer.status_code == 401) == (path not in EXEMPT), (method, path)
    unlisted = {getattr(route, "path", None) for route in api.app.routes} - {None}
    # The last of these answers unknown calls.
    assert unlisted == {"/docs", "/openapi.json", "", "/v1/{path:path}"}


def test_lists_hold_the_projects_own_things_and_cursors_lead_nowhere_else(
    api, client_of, filled, study_spec
):
    a = client_of(project="a")
    assert a.get("/v1/studies") == {"items": [], "next_cursor": None}
    assert a.get("/v1/runs") == {"items": [], "next_cursor": None}
    b = filled["client"]
    for k in range(2):
        b.post("/v1/studies", study_spec(name=f"more-{k}"))
    studies = b.get("/v1/studies", limit=1)["next_cursor"]
    runs = b.get("/v1/runs", limit=1)["next_cursor"]
    assert b.get("/v1/studies", limit=1, cursor=studies)["items"]
    assert a.get("/v1/studies", cursor=studies)["items"] == []
    assert a.get("/v1/runs", cursor=runs)["items"] == []
    assert {study["project"] for study in b.get("/v1/studies")["items"]} == {"b"}


def test_names_and_idempotency_keys_are_a_projects_own(client_of, filled):
    a = client_of(project="a")
    ours = a.post("/v1/studies", filled["spec"], idempotency_key="once")
    assert (ours["name"], ours["project"]) == ("ours", "a")
    assert ours["id"] != filled["study"]["id"]
    assert a.post("/v1/studies", filled["spec"], idempotency_key="once")["id"] == ours["id"]
    with pytest.raises(ServiceError, match="a study of this name exists"):
        a.post("/v1/studies", filled["spec"])


def test_studies_of_one_name_are_apart_in_optuna_too(api, client_of, filled):
    a = client_of(project="a")
    a.post("/v1/studies", filled["spec"])
    lease = Worker(a).lease_one()
    assert lease.trial_number == 0
    sampler = api.sampler
    assert set(sampler.read_states("a/ours")) == {0}
    assert set(sampler.read_states("b/ours")) == {0, 1}


def test_a_study_of_the_default_project_has_its_plain_name_in_optuna(api, submit, worker):
    name = submit()["name"]
    worker.lease_one()
    assert set(api.sampler.read_states(name)) == {0}


def test_a_fleet_of_one_project_leases_that_alone_and_one_of_none_leases_all(client_of, filled):
    assert Worker(client_of(["work"], "a")).lease(9) == ()
    with pytest.raises(ServiceError, match="there is no study 'ours'"):
        Worker(client_of(["work"], "a")).lease(study="ours")
    (lease,) = Worker(client_of(["work"], "b")).lease(1)
    assert lease.study_id == filled["study"]["id"]
    (lease,) = Worker(client_of(["work"], None)).lease(1)
    assert lease.study_id == filled["study"]["id"]


def test_a_lease_token_is_worth_nothing_with_a_key_of_another_project(api, client_of, filled):
    with pytest.raises(ServiceError) as refused:
        Worker(client_of(["work"], "a")).report(filled["leased"])
    assert refused.value.status == 404
    assert Worker(client_of(["work"], None)).report(filled["leased"]) == "continue"


def test_a_fleet_key_reads_nothing_at_all(api, filled):
    key = make_key(api, ["work"], "b")
    for method, path in list_calls(api):
        if path in EXEMPT or path == "/v1/leases":
            continue
        # The calls under a lease are a fleet's work.
        writes = path.endswith(("/measurements", "/checkpoints", "/finish")) and method == "POST"
        answer = send(api, method, path, key, filled)
        assert (answer.status_code == 403) != writes, (method, path, answer.text)


def test_an_admin_names_the_project_to_work_in_and_sees_all_without(api, client_of, filled):
    admin = api.client
    assert admin.get("/v1/studies/ours")["id"] == filled["study"]["id"]
    assert admin.get("/v1/studies", project="a")["items"] == []
    made = admin.request("POST", "/v1/studies", body=filled["spec"], params={"project": "a"})
    assert made.json()["project"] == "a"
    with pytest.raises(ServiceError) as refused:
        admin.get("/v1/studies/ours")
    assert refused.value.type == "urn:warmscale:ambiguous-name"
    assert "a, b" in str(refused.value)
    with Client(api.url, api.key, project="b") as narrowed:
        assert narrowed.get("/v1/studies/ours")["id"] == filled["study"]["id"]


def test_a_project_that_exists_and_one_that_does_not_are_refused_alike(api, filled):
    key = make_key(api, project="a")
    there, nowhere = (
        httpx.get(f"{api.url}/v1/studies?project={name}", headers=bearer(key)) for name in "bc"
    )
    assert (there.status_code, nowhere.status_code) == (404, 404)
    assert text_without_id(there).replace("'b'", "'c'") == text_without_id(nowhere)


def test_what_is_foreign_and_what_is_not_there_are_refused_in_the_same_words(api, filled):
    key = make_key(api, project="a")
    for path, there in (("/v1/studies", "ours"), ("/v1/runs", filled["done"].run_id)):
        answers = [
            text_without_id(httpx.get(f"{api.url}{path}/{name}", headers=bearer(key)))
            for name in (there, "nowhere")
        ]
        assert answers[0].replace(there, "nowhere") == answers[1]


@pytest.mark.parametrize("scopes", [["read"], ["write"], ["work", "read"], ["work", "metrics"]])
def test_only_admins_fleets_and_scrapers_have_keys_for_every_project(api, scopes):
    key = make_key(api, scopes, None)
    with api.sessions.begin() as session:
        caller = keys.find_caller(session, key)
        assert caller.project == "default"
        with pytest.raises(IntegrityError, match="ck_api_keys_project"):
            session.execute(update(ApiKey).where(ApiKey.id == caller.key_id).values(project=None))


def test_keys_are_listed_with_their_last_use_and_without_themselves(api):
    key = make_key(api, ["read"], "a")
    with api.sessions() as session:
        (unused,) = [k for k in keys.list_keys(session) if k.project == "a"]
    assert (unused.last_used_at, unused.state) == (None, "good")
    httpx.get(f"{api.url}/v1/studies", headers=bearer(key))
    with api.sessions() as session:
        (used,) = [k for k in keys.list_keys(session) if k.project == "a"]
        now = session.scalar(select(func.now()))
    assert 0 <= (now - used.last_used_at).total_seconds() < 60
    assert key not in used.model_dump_json()
    assert keys.hash_key(key) not in used.model_dump_json()


names = st.from_regex(PROJECT_PATTERN, fullmatch=True)


@given(names, names)
def test_a_caller_is_narrowed_and_never_widened(own, other):
    caller = Caller(key_id="k", scopes=frozenset(), project=own)
    assert caller.narrow_to(None) == caller.narrow_to(own) == caller
    if other != own:
        with pytest.raises(Exception, match="there is no project"):
            caller.narrow_to(other)
