"""Traces: off by default; the life of a run is a single trace, sent to a collector by OTLP."""

import gzip
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from service.observability import tracing
from service.protocol import traceparent

ONE = {"trials": 1, "parallel": 1, "sampler": "random", "pruner": "none"}


@pytest.fixture
def collector(monkeypatch):
    """The spans that an OTLP collector receives."""
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    spans = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            sent = ExportTraceServiceRequest.FromString(body)
            spans.extend(s for r in sent.resource_spans for o in r.scope_spans for s in o.spans)
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_):
            """Print nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
    yield spans
    server.shutdown()
    server.server_close()


def test_the_life_of_a_run_is_one_trace(collector, api, submit, worker):

    with tracing.export_traces(os.environ):
        submit(hpo=ONE, target=None)
        lease = worker.lease_one()
        worker.evaluate(lease, 1, 3.0)
        worker.complete(lease)
    trace = traceparent(lease.run_id).split("-")[1]
    names = [span.name for span in collector if span.trace_id.hex() == trace]
    assert set(names) >= {
        "run.queued", "run.leased", "run.checkpoint", "run.succeeded", "advance",
        "POST /v1/runs/{run_id}/measurements", "POST /v1/runs/{run_id}/finish",
    }  # fmt: skip
    others = {span.name for span in collector if span.trace_id.hex() != trace}
    assert others >= {"POST /v1/studies", "POST /v1/leases", "lease", "ask"}
    secrets = (lease.lease_token, api.key)
    assert not [s for s in secrets if any(s in str(span) for span in collector)]


@pytest.mark.parametrize(
    ("environment", "is_wanted"),
    [
        ({}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c:4318/v1/traces"}, True),
        ({"WARMSCALE_TRACES": "1"}, True),
        ({"WARMSCALE_TRACES": "0", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}, False),
    ],
)
def test_traces_are_on_when_the_environment_asks(environment, is_wanted):
    assert tracing.are_traces_wanted(environment) == is_wanted


def test_nothing_of_opentelemetry_is_imported_unless_asked_for():
    # FastAPI itself imports OpenTelemetry's API if it is installed. Only the SDK records and sends.
    heavy = "('opentelemetry.sdk', 'opentelemetry.exporter')"
    code = f"import service.app, sys; assert not [m for m in sys.modules if m.startswith({heavy})]"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_is_missing_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace.export", None)
    with (
        pytest.raises(tracing.TracesMissingError, match=r"WARMSCALE_TRACES asks .*\[otel\]"),
        tracing.export_traces({"WARMSCALE_TRACES": "1"}),
    ):
        pass


def test_a_run_has_one_trace_and_no_other_runs():
    one, other = traceparent("run_1"), traceparent("run_2")
    assert one == traceparent("run_1") != other
    assert [len(part) for part in one.split("-")] == [2, 32, 16, 2]
