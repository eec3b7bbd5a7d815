"""Prometheus metrics; docs/observability.md lists them.

Counters and histograms are of this process, as Prometheus expects; gauges of the database are read
when asked for, the same from every replica: sum the first, take the largest of the second.
"""

import platform
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from sqlalchemy import Engine, QueuePool, Select, func, select
from sqlalchemy.orm import Session

from service import __version__
from service.tables import Delivery, Run, Study

CONTENT_TYPE = CONTENT_TYPE_LATEST
disable_created_metrics()  # a series more for every counter, which nobody reads
_registry = CollectorRegistry()
_latency = Histogram(
    "warmscale_request_seconds",
    "Time until the answer to a request began; long-polls include their wait.",
    ("method", "route", "status"),
    registry=_registry,
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
)
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_problems = Counter(
    "warmscale_problems", "Answers that were problems, by type.", ("type",), registry=_registry
)
_stale_writes = Counter(
    "warmscale_stale_writes",
    "Writes refused with 409: another attempt holds the run.",
    registry=_registry,
)
_events = Counter(
    "warmscale_events", "Events that committed, by type.", ("type",), registry=_registry
)
_granted = Counter("warmscale_leases_granted", "Leases granted.", ("kind",), registry=_registry)
_expired = Counter(
    "warmscale_leases_expired", "Leases that ran out and were taken back.", registry=_registry
)
_webhooks = Counter(
    "warmscale_webhook_attempts",
    "Attempts to deliver to a webhook: delivered, failed, or the last one failed (dead).",
    ("outcome",),
    registry=_registry,
)
streams = Gauge("warmscale_event_streams", "Event streams that are open.", registry=_registry)
Gauge("warmscale_build_info", "Constant 1.", ("version", "python"), registry=_registry).labels(
    __version__, platform.python_version()
).set(1)


def observe(method: str, route: str, status: int, seconds: float) -> None:
    """Count an answer. Only methods that have routes are told apart: a client may invent others."""
    _latency.labels(method if method in _METHODS else "other", route, str(status)).observe(seconds)


def count_problem(kind: str) -> None:
    """Count an answer that was a problem."""
    _problems.labels(kind).inc()
    if kind == "stale-lease":
        _stale_writes.inc()


def count_event(type_: str, payload: Mapping[str, Any]) -> None:
    """Count an event that has committed."""
    _events.labels(type_).inc()
    if type_ == "run.leased":
        _granted.labels(payload["kind"]).inc()
    elif type_ == "lease.expired":
        _expired.inc()


def count_delivery(outcome: str) -> None:
    """Count an attempt to deliver to a webhook."""
    _webhooks.labels(outcome).inc()


class _Standing:
    """Gauges that are known when they are asked for."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = tuple(families)

    def collect(self) -> Iterator[Metric]:
        """What prometheus_client calls."""
        yield from self._families


def render(session: Session, engines: Mapping[str, Engine]) -> bytes:
    """Everything, in Prometheus' text format."""
    families = [*_of_database(session), *_of_pools(engines)]
    standing = CollectorRegistry()
    standing.register(_Standing(families))
    return generate_latest(_registry) + generate_latest(standing)


def _of_database(session: Session) -> Iterator[Metric]:
    for name, text, labels, query in _QUERIES:
        family = GaugeMetricFamily(name, text, labels=labels)
        for *values, number in session.execute(query):
            family.add_metric(values, float(number or 0))
        yield family


def _of_pools(engines: Mapping[str, Engine]) -> Iterator[Metric]:
    used = GaugeMetricFamily(
        "warmscale_database_connections_in_use", "Connections checked out.", labels=["pool"]
    )
    size = GaugeMetricFamily(
        "warmscale_database_pool_size", "Connections that a pool keeps.", labels=["pool"]
    )
    for name, engine in engines.items():
        if isinstance(engine.pool, QueuePool):
            used.add_metric([name], engine.pool.checkedout())
            size.add_metric([name], engine.pool.size())
    yield from (used, size)


_waiting = func.extract("epoch", func.max(func.now() - Run.available_at))
# Name, what it says, labels, rows of labels and a number.
_QUERIES: tuple[tuple[str, str, list[str], Select[*tuple[Any, ...]]], ...] = (
    (
        "warmscale_runs",
        "Runs by kind and state.",
        ["kind", "state"],
        select(Run.kind, Run.state, func.count()).group_by(Run.kind, Run.state),
    ),
    (
        "warmscale_studies",
        "Studies by state.",
        ["state"],
        select(Study.state, func.count()).group_by(Study.state),
    ),
    (
        "warmscale_tokens_per_second",
        "Sum over leased runs of what each last reported.",
        ["kind"],
        select(Run.kind, func.sum(Run.tokens_per_second))
        .where(Run.state == "leased")
        .group_by(Run.kind),
    ),
    (
        "warmscale_queue_age_seconds",
        "How long the run that has waited longest has been there to lease.",
        ["kind"],
        select(Run.kind, func.greatest(_waiting, 0))
        .where(Run.state == "queued")
        .group_by(Run.kind),
    ),
    (
        "warmscale_webhook_deliveries",
        "Deliveries by state that are not delivered: waiting to be tried (again), or given up.",
        ["state"],
        select(Delivery.state, func.count())
        .where(Delivery.state != "delivered")
        .group_by(Delivery.state),
    ),
)
