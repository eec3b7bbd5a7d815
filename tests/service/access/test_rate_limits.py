"""Limits of bodies and of request rates, and the security headers of every answer."""

import socket

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.ports import free_port
from service.access import keys
from service.access.rate_limits import RateLimits, TokenBuckets
from service.problems import Problem
from service.settings import Settings
from service.web.protection import SAFE_HEADERS


@pytest.fixture
def settings(home):
    # A request a second: even on a machine with busy cores, a loop sends requests faster.
    return Settings(
        home=home, port=free_port(), max_body_bytes=4096, body_seconds=3.0, requests_per_second=1.0
    )


@pytest.fixture
def now():
    return [0.0]


@pytest.fixture
def limits(now):
    return RateLimits(1.0, lambda: now[0])


def bearer(api):
    return {"Authorization": f"Bearer {api.key}", "Content-Type": "application/json"}


def is_problem(answer, status):
    assert answer.status_code == status, answer.text
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert answer.json()["status"] == status
    return True


def test_a_body_of_the_limit_is_read_and_one_byte_more_is_not(api):
    at = {"url": f"{api.url}/v1/leases", "headers": bearer(api)}
    fits = b'{"worker": "w"}'.ljust(4096)
    assert httpx.post(content=fits, **at).status_code == 200
    assert is_problem(httpx.post(content=fits + b" ", **at), 413)


def test_a_body_of_unknown_length_is_counted_as_it_comes(api):
    pieces = (b" " * 1000 for _ in range(10_000))
    answer = httpx.post(f"{api.url}/v1/leases", content=pieces, headers=bearer(api))
    assert is_problem(answer, 413)


def test_an_announced_length_is_refused_before_a_byte_of_it_is_sent(api):
    port = int(api.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=5) as raw:
        head = f"POST /v1/leases HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {api.key}\r\n"
        raw.sendall(f"{head}Content-Length: 999999999\r\n\r\n".encode())
        assert b"413" in raw.recv(100)


def test_a_body_that_does_not_arrive_is_given_up(api):
    port = int(api.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=10) as raw:
        head = f"POST /v1/leases HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {api.key}\r\n"
        raw.sendall(f"{head}Content-Length: 10\r\n\r\n{{".encode())
        assert b"408" in raw.recv(100)


@pytest.mark.parametrize("opening", [b"[", b'{"a":'])
@pytest.mark.parametrize("depth", [100, 680])
def test_a_body_nested_deep_is_refused_as_any_other_bad_one(api, opening, depth):
    closing = b"]" if opening == b"[" else b"1}"[-1:]
    body = opening * depth + b"1" + closing * depth
    answer = httpx.post(f"{api.url}/v1/leases", content=body, headers=bearer(api))
    assert answer.status_code in (400, 422), answer.text


def test_headers_beyond_all_reason_are_refused(api):
    try:
        answer = httpx.get(f"{api.url}/healthz", headers={"X-Long": "x" * 200_000})
    except httpx.TransportError:
        return  # the server closed the connection: a refusal as well
    assert 400 <= answer.status_code < 500


def test_every_answer_has_the_headers_whoever_makes_it(api, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("broken")

    monkeypatch.setattr("service.access.lookup.find_run", broken)
    auth = ("any", api.key)
    paths = ("/healthz", "/v1/studies", "/v1/nowhere", "/docs", "/openapi.json", "/dashboard/")
    answers = [httpx.get(f"{api.url}{path}", auth=auth) for path in paths]
    answers.append(httpx.get(f"{api.url}/v1/runs/x", headers=bearer(api)))
    answers.append(httpx.post(f"{api.url}/v1/leases", content=b" " * 9999, headers=bearer(api)))
    assert {a.status_code for a in answers} == {200, 401, 404, 413, 500}
    for answer in answers:
        missing = set(map(str.lower, SAFE_HEADERS)) - set(answer.headers)
        assert not missing, (answer.url, missing)
        assert len(answer.headers.get_list("X-Content-Type-Options")) == 1


def test_docs_loads_nothing_and_runs_nothing(api):
    page = httpx.get(f"{api.url}/docs")
    assert "<script" not in page.text
    assert "src=" not in page.text
    assert "/v1/leases" in page.text
    assert page.headers["Content-Security-Policy"].startswith("default-src 'none'; style-src 'sha")


def test_a_key_is_slowed_down_alone_and_told_for_how_long(api):
    from service.access import keys

    with api.sessions.begin() as session:
        other = keys.create_key(session, "other", ["read"])[1]
    with httpx.Client(base_url=api.url) as http:
        answers = [http.get("/v1/studies", headers=bearer(api)) for _ in range(80)]
        refused = [a for a in answers if a.status_code == 429]
        assert refused
        assert is_problem(refused[0], 429)
        assert int(refused[0].headers["Retry-After"]) >= 1
        fine = http.get("/v1/studies", headers={"Authorization": f"Bearer {other}"})
        assert fine.status_code == 200


def test_wrong_keys_from_an_address_are_refused_before_the_database_is_asked(api, monkeypatch):
    with httpx.Client(base_url=api.url) as http:
        http.get("/v1/studies", headers=bearer(api))
        wrong = {"Authorization": "Bearer ws_wrong"}
        answers = [http.get("/v1/studies", headers=wrong) for _ in range(90)]
        assert answers[0].status_code == 401
        assert answers[-1].status_code == 429
        assert http.get("/v1/studies", headers=bearer(api)).status_code == 200


def test_a_guesser_shuts_out_strangers_of_its_network_and_nobody_else(limits, now):
    # 60 wrong keys pass at once, and another each second.
    for _ in range(61):
        limits.count_wrong_key("2001:db8::1")
    with pytest.raises(Problem, match="wrong API keys"):
        limits.check_address("2001:db8::ffff", "unknown")
    limits.check_address("2001:db8:0:1::1", "unknown")
    limits.check_address("", "unknown")
    limits.count_request("known")
    limits.check_address("2001:db8::1", "known")
    now[0] = 70.0
    limits.check_address("2001:db8::1", "unknown")


def test_a_key_that_was_good_within_a_day_passes_a_guesser(limits, now):
    limits.count_request("known")
    now[0] = 86_000.0
    for _ in range(61):
        limits.count_wrong_key("192.0.2.1")
    limits.check_address("192.0.2.1", "known")
    now[0] = 86_500.0
    for _ in range(61):
        limits.count_wrong_key("192.0.2.1")
    with pytest.raises(Problem, match="wrong API keys"):
        limits.check_address("192.0.2.1", "known")


@given(st.floats(0.1, 100.0), st.integers(1, 50), st.lists(st.floats(0.0, 5.0), min_size=1))
def test_no_more_pass_than_the_burst_and_what_has_flowed_in_since(per_second, at_once, pauses):
    clock = [0.0]
    buckets, passed = TokenBuckets(per_second, at_once, lambda: clock[0]), 0
    for pause in pauses:
        clock[0] += pause
        passed += buckets.take_token("k") == 0.0
        assert passed <= at_once + clock[0] * per_second + 1e-6


@given(st.floats(0.1, 100.0), st.integers(1, 50))
def test_who_waits_as_long_as_told_passes(per_second, at_once):
    clock = [0.0]
    buckets = TokenBuckets(per_second, at_once, lambda: clock[0])
    for _ in range(at_once):
        assert buckets.take_token("k") == 0.0
    wait = buckets.take_token("k")
    assert 0 < wait <= 1 / per_second + 1e-6
    clock[0] += wait
    assert buckets.take_token("k") == 0.0


def test_a_key_that_may_not_is_limited_as_any_other(api):
    with api.sessions.begin() as session:
        _, key = keys.create_key(session, "metrics", ["metrics"])
    headers = {"Authorization": f"Bearer {key}"}
    found = {httpx.get(f"{api.url}/v1/studies", headers=headers).status_code for _ in range(120)}
    assert found == {403, 429}
