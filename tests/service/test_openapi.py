"""The OpenAPI document is complete: it has every answer that the live service gives."""

import os
from collections import Counter

import httpx
import pytest

from tests.conftest import create_database, make_scratch_folder, make_settings, serve_api

from . import fuzz

LONG = os.environ.get("WARMSCALE_FUZZ_EXAMPLES")  # set by `make fuzz`
# These calls succeed only with four finished trials, a checkpoint, parameters of the search space,
# or a study that has not ended. Random calls rarely make those.
NEED_A_HISTORY = {
    f"{call.replace(' ', ' /v1/studies/{study}/')}"
    for call in ("GET importance", "POST targets", "POST trials", "POST pause", "POST resume")
}
NEED_A_HISTORY.add("POST /v1/runs/{run_id}/checkpoints")  # needs a lease that has not ended
QUICK = ("--phases", "fuzzing,stateful", "--max-examples", "6", "--no-shrink")


@pytest.fixture(scope="module")
def api(postgres):
    """Leases that last an hour: on a busy machine, too, no report comes after its lease expired."""
    with make_scratch_folder() as home, create_database(postgres) as url:
        settings = make_settings(home).model_copy(update={"lease_seconds": 3600.0})
        with serve_api(settings, url) as api:
            yield api


@pytest.fixture
def document(api):
    return httpx.get(f"{api.url}/openapi.json").json()


def list_operations(document):
    return [
        (path, method, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]


@pytest.mark.timeout(3600 if LONG else 300)
def test_no_call_answers_what_the_document_does_not_say(api, document, study_spec, tmp_path):
    for _ in range(3):
        api.client.post("/v1/studies", study_spec(hpo={"trials": 1000, "parallel": 100}))
    size = ("--max-examples", LONG) if LONG else QUICK
    done = fuzz.run_fuzzer(api, study_spec(), tmp_path, "--generation-deterministic", *size)
    print(*fuzz.format_lines(done.statuses), sep="\n")  # noqa: T201 - the result of `make fuzz`
    assert done.code == 0, done.output[-20_000:]
    assert not fuzz.count_faults(done.statuses)
    ours = {f"{method.upper()} {path}" for path, method, _ in list_operations(document)}
    unreached = {call for call in ours if not {200, 201} & set(done.statuses[call])}
    assert unreached <= NEED_A_HISTORY


def test_the_sum_of_calls_says_how_many_had_no_good_answer():
    statuses = {"GET /a": Counter({200: 3, 503: 2}), "POST /b": Counter({None: 1, 422: 4})}
    *_, last = fuzz.format_lines(statuses)
    assert last == "     10  in all, to 2 calls; 3 with 5xx or without an answer"


def test_a_document_that_lies_is_found_out(api, study_spec, tmp_path, monkeypatch):
    honest = api.app.openapi()
    lie = honest | {"paths": {"/v1/runs": {"get": dict(honest["paths"]["/v1/runs"]["get"])}}}
    answer = {"content": {"application/json": {"schema": {"required": ["total"]}}}}
    lie["paths"]["/v1/runs"]["get"]["responses"] = {"200": {"description": "", **answer}}
    monkeypatch.setattr(api.app, "openapi", lambda: lie)
    # The document now requires a field `total` that the service does not send.
    done = fuzz.run_fuzzer(api, study_spec(), tmp_path, *QUICK, "--generation-deterministic")
    assert done.code == 1
    assert "Response violates schema" in done.output
    assert "Undocumented status code" in done.output


def test_every_refusal_is_documented_as_a_problem(document):
    for path, method, operation in list_operations(document):
        refusals = {s: r for s, r in operation["responses"].items() if int(s) >= 400}
        assert "500" in refusals, (path, method)
        assert ("401" in refusals) == ("security" in operation), (path, method)
        assert ("404" in refusals) >= ("{" in path), (path, method)
        assert ("413" in refusals) == ("requestBody" in operation), (path, method)
        for response in refusals.values():
            assert list(response["content"]) == ["application/problem+json"]


def test_a_created_study_and_a_lease_lead_to_every_call_about_them(document):
    paths = document["paths"]
    for source, status, subject in (
        ("/v1/studies", "201", "{study}"),
        ("/v1/leases", "200", "{run_id}"),
    ):
        links = paths[source]["post"]["responses"][status]["links"]
        about = {o["operationId"] for p, _, o in list_operations(document) if subject in p}
        assert about <= set(links)


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("PUT", "/v1/studies", "GET, POST"),
        ("DELETE", "/v1/studies/x", "GET"),
        ("GET", "/v1/leases", "POST"),
        ("TRACE", "/v1/runs/x/measurements", "GET, POST"),
        ("OPTIONS", "/v1/runs", "GET"),
    ],
)
def test_a_method_that_a_call_has_not_is_a_405_that_says_which_it_has(api, method, path, allowed):
    response = httpx.request(method, f"{api.url}{path}")
    assert (response.status_code, response.headers["Allow"]) == (405, allowed)
    assert response.headers["content-type"] == "application/problem+json"


def test_a_body_that_is_not_read_is_a_415_that_says_what_is(api):
    key = {"Authorization": f"Bearer {api.key}"}
    for headers, works in (
        ({"Content-Type": "application/x-yaml"}, "application/json"),
        ({"Content-Type": "application/json", "Content-Encoding": "gzip"}, "uncompressed"),
    ):
        response = httpx.post(
            f"{api.url}/v1/studies", content=b"\x1f\x8b\x08", headers=key | headers
        )
        assert response.status_code == 415
        assert works in response.json()["detail"]


@pytest.mark.parametrize("number", [True, "2", 2.5])
def test_what_is_no_whole_number_is_refused_where_one_is_meant(api, number):
    body = {"worker": "w", "max_runs": number}
    response = httpx.post(
        f"{api.url}/v1/leases", json=body, headers={"Authorization": f"Bearer {api.key}"}
    )
    assert (response.status_code, response.json()["errors"][0]["path"]) == (422, "max_runs")
