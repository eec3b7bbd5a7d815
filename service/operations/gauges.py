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


class _FixedCollector:
    """Gauges that are read already, in the form in which prometheus_client asks for them."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = tuple(families)

    def collect(self) -> Iterator[Metric]:
        """Yield the gauges; prometheus_client calls this."""
        yield from self._families


def render_metrics(session: Session, engines: Mapping[str, Engine]) -> bytes:
    """Return all metrics in the text format of Prometheus; `engines` are named by their pool."""
    families = [*_read_database(session), *_read_pools(engines)]
    # Counters live in this process for as long as it runs. Gauges are of this scrape alone, so they
    # get a registry that is thrown away: two scrapes at once share nothing.
    gauges = CollectorRegistry()
    gauges.register(_FixedCollector(families))
    return generate_latest(registry) + generate_latest(gauges)


def _read_database(session: Session) -> Iterator[Metric]:
    for name, text, labels, query in _QUERIES:
        family = GaugeMetricFamily(name, text, labels=labels)
        for *values, number in session.execute(query):
            family.add_metric(values, float(number or 0))
        yield family


def _read_pools(engines: Mapping[str, Engine]) -> Iterator[Metric]:
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


# A queued run may have an `available_at` in the future: a retry that waits for its pause. Its age
# is negative, and a queue of only such runs has age 0.
_waiting_seconds = func.extract("epoch", func.max(func.now() - Run.available_at))
# Each entry: name, text, labels, and a query; a row has the labels' values and a number.
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
        "Sum over leased runs of the speed in their last reports.",
        ["kind"],
        select(Run.kind, func.sum(Run.tokens_per_second))
        .where(Run.state == "leased")
        .group_by(Run.kind),
    ),
    (
        "warmscale_queue_age_seconds",
        "Seconds since the longest waiting queued run became available for a lease.",
        ["kind"],
        select(Run.kind, func.greatest(_waiting_seconds, 0))
        .where(Run.state == "queued")
        .group_by(Run.kind),
    ),
    (
        "warmscale_webhook_deliveries",
        "Deliveries by state that are not delivered: waiting for an attempt, or given up.",
        ["state"],
        select(Delivery.state, func.count())
        .where(Delivery.state != "delivered")
        .group_by(Delivery.state),
    ),
)
