"""Counters of this process for Prometheus; docs/observability.md lists all metrics.

`operations.gauges` reads the gauges from the database, so every replica reports the same numbers.
Over replicas, sum the counters and take the maximum of the gauges.
"""

import platform
from collections.abc import Mapping
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
)

from service import __version__

disable_created_metrics()  # `_created` would double the number of series, and nobody reads it
registry = CollectorRegistry()
# Fine buckets up to 50 ms, where reports lie, and coarse ones up to 60 s, a long-poll's most.
_latency = Histogram(
    "warmscale_request_seconds",
    "Time until the answer to a request began; long-polls include their wait.",
    ("method", "route", "status"),
    registry=registry,
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
)
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_problems = Counter(
    "warmscale_problems", "Answers that were problems, by type.", ("type",), registry=registry
)
_stale_writes = Counter(
    "warmscale_stale_writes",
    "Writes refused with 409: another attempt holds the run.",
    registry=registry,
)
_events = Counter(
    "warmscale_events", "Events that committed, by type.", ("type",), registry=registry
)
_granted = Counter("warmscale_leases_granted", "Leases granted.", ("kind",), registry=registry)
_expired = Counter(
    "warmscale_leases_expired", "Leases that ran out and were taken back.", registry=registry
)
_webhooks = Counter(
    "warmscale_webhook_attempts",
    "Attempts to deliver to a webhook: delivered, failed, or the last one failed (dead).",
    ("outcome",),
    registry=registry,
)
# A gauge of this process: each replica reports its own streams, so sum them.
streams = Gauge("warmscale_event_streams", "Event streams that are open.", registry=registry)
Gauge("warmscale_build_info", "Constant 1.", ("version", "python"), registry=registry).labels(
    __version__, platform.python_version()
).set(1)


def observe_request(method: str, route: str, status: int, seconds: float) -> None:
    """Count an answer.

    A method without routes counts as `other`: a client that invents methods must not be able to
    create a time series for each.
    """
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
