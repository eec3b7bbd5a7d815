"""The id of every request, its time, and the counters that it adds to."""

import asyncio
import re

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from service.web import request_log

MADE = re.compile(r"[0-9a-f]{32}")


@pytest.fixture
def api(shared_api):
    return shared_api


def get(api, path, **headers):
    bearer = {"Authorization": f"Bearer {api.key}"}
    return httpx.get(f"{api.url}{path}", headers=bearer | headers)


def count_answers(api, **labels):
    """Count the answers that were timed under these labels."""
    families = text_string_to_metric_families(get(api, "/metrics").text)
    return sum(
        sample.value
        for family in families
        for sample in family.samples
        if sample.name == "warmscale_request_seconds_count"
        and labels.items() <= sample.labels.items()
    )


def test_a_request_keeps_the_id_it_came_with(api):
    assert (
        get(api, "/healthz", **{"X-Request-ID": "ab-1.2:3"}).headers["X-Request-ID"] == "ab-1.2:3"
    )


@pytest.mark.parametrize("given", ["", "a b", "a\tb", 'a"b', "x" * 129, "é"])
def test_an_id_that_cannot_stand_in_a_log_is_replaced(api, given):
    answer = get(api, "/healthz", **{"X-Request-ID": given.encode()})
    assert MADE.fullmatch(answer.headers["X-Request-ID"])


def test_every_request_has_an_id_of_its_own(api):
    ids = {get(api, "/healthz").headers["X-Request-ID"] for _ in range(5)}
    assert len(ids) == 5


@pytest.mark.parametrize("path", ["/v1/runs/none", "/v1/nothing", "/v1/runs?limit=-1"])
def test_a_problem_says_the_id_of_its_request(api, path):
    answer = get(api, path)
    assert answer.json()["request_id"] == answer.headers["X-Request-ID"]


def test_a_fault_of_ours_says_its_id_too(api, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("broken")

    monkeypatch.setattr("service.access.lookup.find_run", broken)
    before = count_answers(api, status="500")
    answer = get(api, "/v1/runs/any", **{"X-Request-ID": "find-me"})
    assert (answer.status_code, answer.json()["request_id"]) == (500, "find-me")
    assert answer.headers.get_list("X-Request-ID") == ["find-me"]
    assert count_answers(api, status="500") == before + 1


def test_an_answer_is_counted_under_the_whole_template_of_its_path(api):
    labels = {"method": "GET", "route": "/v1/runs/{run_id}/measurements", "status": "404"}
    before = count_answers(api, **labels)
    get(api, "/v1/runs/none/measurements")
    assert count_answers(api, **labels) == before + 1


def test_invented_paths_and_methods_make_no_new_label(api):
    for path in ("/v2/a", "/v2/b"):
        httpx.request("BREW", f"{api.url}{path}", auth=("any", api.key))
    assert count_answers(api, method="BREW") == 0
    # Both requests count under the same labels.
    assert count_answers(api, method="other", route="other") >= 2


def test_a_stream_is_timed_at_its_first_byte_and_logged_at_its_end(caplog):
    caplog.set_level("INFO", "service.access")

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        assert not caplog.records
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    run_app(app)
    (line,) = caplog.records
    assert (line.method, line.route, line.status) == ("GET", "other", 200)


def test_a_client_that_left_before_its_answer_is_a_499(caplog):
    caplog.set_level("INFO", "service.access")

    async def app(scope, receive, send):
        """Return without an answer."""

    run_app(app)
    assert [line.status for line in caplog.records] == [499]


def run_app(app):
    scope = {"type": "http", "method": "GET", "path": "/", "headers": []}

    async def send(message):
        pass

    asyncio.run(request_log.RequestLogMiddleware(app)(scope, None, send))
