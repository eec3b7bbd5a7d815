"""Gauges for Prometheus, read from the database and the connection pools at each scrape."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    generate_latest,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from sqlalchemy import Engine, QueuePool, Select, func, select
from sqlalchemy.orm import Session

from service.database.tables import Delivery, Run, Study
from service.observability.metrics import registry

CONTENT_TYPE = CONTENT_TYPE_LATEST


class _Standing:
    """Gauges that are known when they are asked for."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = tuple(families)

    def collect(self) -> Iterator[Metric]:
        """What prometheus_client calls."""
        yield from self._families


def render_metrics(session: Session, engines: Mapping[str, Engine]) -> bytes:
    """Everything, in Prometheus' text format."""
    families = [*_of_database(session), *_of_pools(engines)]
    standing = CollectorRegistry()
    standing.register(_Standing(families))
    return generate_latest(registry) + generate_latest(standing)


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
