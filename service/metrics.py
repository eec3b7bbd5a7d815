"""Prometheus metrics: request latency by route, runs and studies by state from the database."""

from prometheus_client import CollectorRegistry, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from service.tables import Run, Study

CONTENT_TYPE = CONTENT_TYPE_LATEST
_registry = CollectorRegistry()
_latency = Histogram(
    "warmscale_request_seconds",
    "Time to answer a request; long-polls include their wait.",
    ("method", "route", "status"),
    registry=_registry,
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
)
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


def observe(method: str, route: str, status: int, seconds: float) -> None:
    """Count an answer. Only methods that have routes are told apart: a client may invent others."""
    _latency.labels(method if method in _METHODS else "other", route, str(status)).observe(seconds)


def render(session: Session) -> bytes:
    """Everything, in Prometheus' text format. States are read when asked for: no counter drifts."""
    states = CollectorRegistry()
    runs = Gauge("warmscale_runs", "Runs by kind and state.", ("kind", "state"), registry=states)
    query = select(Run.kind, Run.state, func.count()).group_by(Run.kind, Run.state)
    for kind, state, count in session.execute(query):
        runs.labels(kind, state).set(count)
    studies = Gauge("warmscale_studies", "Studies by state.", ("state",), registry=states)
    for state, count in session.execute(select(Study.state, func.count()).group_by(Study.state)):
        studies.labels(state).set(count)
    speed = Gauge("warmscale_tokens_per_second", "Sum over leased runs.", registry=states)
    speed.set(session.scalar(_speed) or 0.0)
    return generate_latest(_registry) + generate_latest(states)


_speed = select(func.sum(Run.tokens_per_second)).where(Run.state == "leased")
