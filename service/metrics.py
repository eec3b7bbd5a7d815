"""Prometheus metrics: request latency by route, runs and studies by state from the database."""

import time
from collections.abc import Awaitable, Callable

from fastapi import FastAPI, Request, Response
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
)


def install(app: FastAPI) -> None:
    """Time every request of `app`."""

    @app.middleware("http")
    async def timed(
        request: Request, call_next: Callable[[Request], Awaitable[Response]]
    ) -> Response:
        start = time.perf_counter()
        response = await call_next(request)
        route = getattr(request.scope.get("route"), "path", "other")
        labels = (request.method, route, str(response.status_code))
        _latency.labels(*labels).observe(time.perf_counter() - start)
        return response


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
