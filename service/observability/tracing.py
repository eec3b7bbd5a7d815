"""OpenTelemetry traces. OpenTelemetry is imported only if the environment asks for traces.

A run is a trace, and each event of the run is a span of it, written by any replica. The trace's id
is a hash of the run's id, so that workers can send it in `traceparent` without OpenTelemetry.
"""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from service import __version__
from service.protocol import TRACE_HEADER, traceparent

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
    from opentelemetry.trace import Span, Tracer

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
SWITCH = "WARMSCALE_TRACES"
_OFF = frozenset({"", "0", "false", "no", "off"})
# Holds "tracer" while traces are on. Every `span` looks here, so it is a cheap look-up when off.
_state: "dict[str, Tracer]" = {}


class TracesMissingError(Exception):
    """The environment asks for traces, and OpenTelemetry is not installed."""


def are_traces_wanted(environment: Mapping[str, str]) -> bool:
    """Return the value of `WARMSCALE_TRACES`; if it is unset, whether an endpoint is set."""
    switch = environment.get(SWITCH)
    if switch is not None:
        return switch.strip().lower() not in _OFF
    return any(environment.get(name) for name in ENDPOINTS)


@contextmanager
def export_traces(environment: Mapping[str, str]) -> Generator[None]:
    """Send traces to the endpoint of OpenTelemetry's own variables while the block runs.

    Without `are_traces_wanted`, do nothing.

    Raises:
        TracesMissingError: the environment asks for traces, and the extra is not installed.
    """
    if not are_traces_wanted(environment):
        yield
        return
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import (  # noqa: PLC0415
            OTLPSpanExporter,
        )
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415
    except ImportError as error:
        name = next(name for name in (SWITCH, *ENDPOINTS) if environment.get(name))
        raise TracesMissingError(
            f"{name} asks for traces: pip install 'warmscale[otel]', or set {SWITCH}=0 ({error})"
        ) from error
    with record_spans(BatchSpanProcessor(OTLPSpanExporter())):
        yield


@contextmanager
def record_spans(processor: "SpanProcessor") -> Generator[None]:
    """Give every span to this processor while the block runs."""
    provider = _make_provider()
    provider.add_span_processor(processor)
    _state["tracer"] = provider.get_tracer("warmscale", __version__)
    try:
        yield
    finally:
        del _state["tracer"]
        provider.shutdown()


def _make_provider() -> "TracerProvider":
    from opentelemetry.sdk.resources import SERVICE_NAME, Resource  # noqa: PLC0415
    from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415

    resource = Resource.create({"service.version": __version__})
    # OTEL_SERVICE_NAME comes first; OpenTelemetry's own default is no help in a list of services.
    if resource.attributes.get(SERVICE_NAME) == "unknown_service":
        resource = resource.merge(Resource({SERVICE_NAME: "warmscale"}))
    return TracerProvider(resource=resource)


@contextmanager
def span(
    name: str, *, within: str | None = None, **attributes: str | float | None
) -> "Generator[Span | None]":
    """Open a span while the block runs, None if traces are off; `within` is a `traceparent`."""
    tracer = _state.get("tracer")
    if tracer is None:
        yield None
        return
    # OpenTelemetry has no value for None: leave those attributes out.
    known: dict[str, Any] = {f"warmscale.{k}": v for k, v in attributes.items() if v is not None}
    context = None if within is None else _parse_context(within)
    with tracer.start_as_current_span(name, context, attributes=known) as opened:
        yield opened


def _parse_context(header: str) -> Any:
    from opentelemetry.trace.propagation.tracecontext import (  # noqa: PLC0415
        TraceContextTextMapPropagator,
    )

    return TraceContextTextMapPropagator().extract({TRACE_HEADER: header})


def add_event_span(type_: str, run_id: str | None, attempt: int | None, actor: str) -> None:
    """Add an event that has committed to the trace of its run, as a span without duration."""
    if run_id is not None and _state:
        with span(type_, within=traceparent(run_id), run=run_id, attempt=attempt, actor=actor):
            pass
