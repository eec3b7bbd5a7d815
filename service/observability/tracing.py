"""OpenTelemetry traces, for who asks for them; nothing of it is imported for who does not.

A run's life is one trace: its id follows from the run's, so that workers name it in `traceparent`
without OpenTelemetry, and every event of the run is a span in it, whichever process wrote it.
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
_state: "dict[str, Tracer]" = {}


class TracesMissingError(Exception):
    """Traces were asked for, and what makes them is not installed."""


def are_traces_wanted(environment: Mapping[str, str]) -> bool:
    """Whether an endpoint is named; where `WARMSCALE_TRACES` is set, that decides."""
    switch = environment.get(SWITCH)
    if switch is not None:
        return switch.strip().lower() not in _OFF
    return any(environment.get(name) for name in ENDPOINTS)


@contextmanager
def export_traces(environment: Mapping[str, str]) -> Generator[None]:
    """Send traces while inside, to where OpenTelemetry's own variables say, if they are wanted.

    Raises:
        TracesMissingError: they are, and the extra is not installed.
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
        asked = next(name for name in (SWITCH, *ENDPOINTS) if environment.get(name))
        raise TracesMissingError(
            f"{asked} asks for traces: pip install 'warmscale[otel]', or set {SWITCH}=0 ({error})"
        ) from error
    with record_spans(BatchSpanProcessor(OTLPSpanExporter())):
        yield


@contextmanager
def record_spans(processor: "SpanProcessor") -> Generator[None]:
    """Hand every span to this processor while inside."""
    provider = _provider()
    provider.add_span_processor(processor)
    _state["tracer"] = provider.get_tracer("warmscale", __version__)
    try:
        yield
    finally:
        del _state["tracer"]
        provider.shutdown()


def _provider() -> "TracerProvider":
    from opentelemetry.sdk.resources import SERVICE_NAME, Resource  # noqa: PLC0415
    from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415

    named = Resource.create({"service.version": __version__})
    if named.attributes.get(SERVICE_NAME) == "unknown_service":
        named = named.merge(Resource({SERVICE_NAME: "warmscale"}))
    return TracerProvider(resource=named)


@contextmanager
def span(
    name: str, *, within: str | None = None, **attributes: str | float | None
) -> "Generator[Span | None]":
    """A span while inside, None where traces are off; `within` is a `traceparent`."""
    tracer = _state.get("tracer")
    if tracer is None:
        yield None
        return
    known: dict[str, Any] = {f"warmscale.{k}": v for k, v in attributes.items() if v is not None}
    context = None if within is None else _context(within)
    with tracer.start_as_current_span(name, context, attributes=known) as one:
        yield one


def _context(header: str) -> Any:
    from opentelemetry.trace.propagation.tracecontext import (  # noqa: PLC0415
        TraceContextTextMapPropagator,
    )

    return TraceContextTextMapPropagator().extract({TRACE_HEADER: header})


def add_event_span(type_: str, run_id: str | None, attempt: int | None, actor: str) -> None:
    """An event that has committed, in the trace of its run."""
    if run_id is not None and _state:
        with span(type_, within=traceparent(run_id), run=run_id, attempt=attempt, actor=actor):
            pass
