"""A fleet whose requests another server answers, with pages or an unknown protocol."""

import contextlib
import json
import queue
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from service.client import BadAnswerError, Client
from service.protocol import FinishRequest, LeaseRequest, MeasurementBatch, Resources
from workers.fleet.service_link import ServiceLink

_PAGES = {"html": b"<html>Sign in</html>", "newer": json.dumps({"leases": [{"new": 1}]}).encode()}


@pytest.fixture(params=_PAGES)
def stranger(request):
    """The URL of a server that answers every request with 200 and a page."""

    class Page(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("Content-Length", str(len(_PAGES[request.param])))
            self.end_headers()
            self.wfile.write(_PAGES[request.param])

        def log_message(self, *args) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Page) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def request_for_leases() -> LeaseRequest:
    return LeaseRequest(worker="w", resources=Resources(cpus=1), wait_seconds=0.0)


def _request_leases(link: ServiceLink, request: LeaseRequest) -> object:
    answers: queue.SimpleQueue = queue.SimpleQueue()
    link.request_leases(request, answers.put)
    return answers.get(timeout=60)


def test_an_answer_that_cannot_be_read_is_the_reason_for_no_leases(
    stranger, request_for_leases, caplog
) -> None:
    with contextlib.closing(ServiceLink(stranger, "key")) as link:
        assert isinstance(_request_leases(link, request_for_leases), BadAnswerError)
    assert "service away" in caplog.text


def test_every_asking_is_answered_whatever_goes_wrong(url, request_for_leases, monkeypatch) -> None:
    def raise_error(*_: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(Client, "lease", raise_error)
    with contextlib.closing(ServiceLink(url, "key")) as link:
        assert isinstance(_request_leases(link, request_for_leases), RuntimeError)


def test_an_end_that_cannot_be_told_is_logged(stranger, fake, make_spec, caplog) -> None:
    lease = fake.leased(make_spec()).lease
    with contextlib.closing(ServiceLink(stranger, "key")) as link:
        link.finish_attempt(lease, FinishRequest(outcome="released"))
    assert "finish not sent" in caplog.text


def test_to_a_worker_a_bad_answer_is_no_fault_of_the_spec(stranger, fake, make_spec) -> None:
    lease = fake.leased(make_spec()).lease
    with (
        Client(stranger, "key") as client,
        pytest.raises(BadAnswerError, match="ReportReply") as bad,
    ):
        client.report(lease, MeasurementBatch(measurements=()))
    assert not isinstance(bad.value, ValueError)
