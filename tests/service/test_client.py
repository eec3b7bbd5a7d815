"""The retries of the client: requests that it sends again, and writes that it must not."""

import time

import httpx
import pytest

from service import client as clients
from service.client import Client, ServiceError
from warmcore.storage import backoff

LOST = httpx.ReadError("connection reset")
UNSENT = httpx.ConnectError("connection refused")
BUSY = httpx.Response(503, json={"type": "urn:warmscale:busy"})
DONE = httpx.Response(200, json={"done": True})


@pytest.fixture
def client(monkeypatch):
    monkeypatch.setattr(clients, "_BACKOFF", backoff.every(0.001))
    with Client("http://service", "ws_key", patience_seconds=5) as client:
        yield client


@pytest.fixture
def answering(client):
    """A function that sets the service's answers, and returns the list of requests to come."""

    def answer(*answers):
        remaining, sent = list(answers), []

        def handle(request):
            sent.append(request)
            answer = remaining.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer

        client.close()
        client._http = httpx.Client(base_url="http://s", transport=httpx.MockTransport(handle))
        return sent

    return answer


@pytest.mark.parametrize("lost", [LOST, BUSY])
def test_a_write_that_counts_twice_when_sent_twice_is_sent_once(client, answering, lost):
    sent = answering(lost, DONE)
    with pytest.raises((httpx.ReadError, ServiceError)):
        client.post("/v1/studies/a/targets", {"target": {"width": 64}})
    assert len(sent) == 1


def test_what_never_left_is_sent_again(client, answering):
    answering(UNSENT, UNSENT, DONE)
    assert client.post("/v1/studies/a/targets") == {"done": True}


@pytest.mark.parametrize("lost", [LOST, BUSY, UNSENT])
def test_what_counts_once_is_sent_until_it_is_answered(client, answering, lost):
    answering(lost, lost, DONE)
    assert client.post("/v1/studies", {}, idempotency_key="key") == {"done": True}
    answering(lost, lost, DONE)
    assert client.post("/v1/studies/a/pause", retry=True) == {"done": True}
    answering(lost, lost, DONE)
    assert client.get("/v1/studies") == {"done": True}


# "soon" is neither seconds nor a date, and is ignored.
@pytest.mark.parametrize(("asked", "least"), [("0", 0.0), ("1", 1.0), ("soon", 0.0)])
def test_what_retry_after_asks_for_is_waited_for_first(client, answering, asked, least):
    answering(httpx.Response(503, headers={"Retry-After": asked}), DONE)
    start = time.monotonic()
    assert client.get("/v1/studies") == {"done": True}
    assert time.monotonic() - start >= least


def test_retry_after_is_waited_for_no_longer_than_patience_lasts(client, answering):
    client.patience_seconds = 0.2
    answering(httpx.Response(503, headers={"Retry-After": "86400"}), DONE)
    assert client.get("/v1/studies") == {"done": True}


def test_a_write_that_was_one_request_too_many_is_sent_again(client, answering):
    answering(httpx.Response(429, headers={"Retry-After": "0"}), DONE)
    assert client.post("/v1/studies/a/targets") == {"done": True}
