"""The tables of the benchmark in Markdown."""

import statistics
from collections.abc import Iterable
from typing import Any

from throughput.measuring import Measured
from throughput.workload import Spent

PRUNERS = ("none", "median", "hyperband")
_CALLS = {"ours": ("lease", "report", "finish"), "Optuna": ("ask", "trial.report", "tell")}
_COSTS = ("side", "API", "PostgreSQL", "clients", "commits", "WAL, kB", "RSS")


def format_markdown(conditions: dict[str, Any], rows: list[Measured]) -> str:
    """Return conditions, ratios, latencies and costs as Markdown."""
    lines = [
        _format_conditions(conditions),
        "",
        *_format_table(
            ("ours, trials/s", "Optuna, trials/s", "ratio (min..max)"), map(_format_ratio, rows)
        ),
        "Milliseconds a call, p50 / p95 / p99:",
        "",
        *_format_table((*_CALLS["ours"], *_CALLS["Optuna"]), map(_format_latency, rows)),
        "Costs of a trial: CPU milliseconds, commits, WAL; and the API's resident memory:",
        "",
        *_format_table(_COSTS, (line for row in rows for line in _format_costs(row))),
    ]
    return "\n".join(lines)


def _format_conditions(conditions: dict[str, Any]) -> str:
    sync = conditions["fdatasync_ms"]
    return (
        f"{conditions['cores']} core(s) at load {conditions['load']:.1f}, shared by clients, API "
        f"and PostgreSQL {conditions['postgresql']} (fsync on; fdatasync of a page "
        f"{sync['p50']:.2f} ms, {sync['p5']:.2f} to {sync['p95']:.2f}), Python "
        f"{conditions['python']}, Optuna {conditions['optuna']}. {conditions['rounds']} round(s) a "
        f"side by turns; {conditions['replicas']} API process(es); our clients are processes with "
        f"{conditions['client']}, Optuna's are {conditions['optuna_clients']}."
    )


def _format_table(columns: Iterable[str], rows: Iterable[str]) -> list[str]:
    names = ["finished", "clients", "pruner", *columns]
    return [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}", *rows, ""]


def _format_ratio(row: Measured) -> str:
    ratio = f"**{row.ratio:.2f}** ({min(row.ratios):.2f}..{max(row.ratios):.2f})"
    ours, theirs = (statistics.median(side.per_second) for side in (row.ours, row.theirs))
    return f"| {_format_scenario(row)} | {ours:.1f} | {theirs:.1f} | {ratio} |"


def _format_scenario(row: Measured) -> str:
    return f"{row.scenario.finished:,} | {row.scenario.clients} | {row.scenario.pruner}"


def _format_latency(row: Measured) -> str:
    ours = [_format_percentiles(row.ours, call) for call in _CALLS["ours"]]
    theirs = [_format_percentiles(row.theirs, call) for call in _CALLS["Optuna"]]
    return f"| {_format_scenario(row)} | {' | '.join(ours + theirs)} |"


def _format_percentiles(side: Spent, call: str) -> str:
    # 99 cuts: the p-th percentile is cuts[p - 1].
    cuts = statistics.quantiles(side.calls[call], n=100, method="inclusive")
    return " / ".join(f"{1000 * cuts[p - 1]:.1f}" for p in (50, 95, 99))


def _format_costs(row: Measured) -> list[str]:
    memory = f"{row.api_rss_mb[0]:.0f} to {row.api_rss_mb[1]:.0f} MB"
    return [
        _format_cost(row, "ours", row.ours, memory),
        _format_cost(row, "Optuna", row.theirs, ""),
    ]


def _format_cost(row: Measured, name: str, side: Spent, memory: str) -> str:
    cpu = [f"{statistics.median(side.cpu_ms[part]):.1f}" for part in ("api", "postgres", "clients")]
    writes = [f"{statistics.median(values):.1f}" for values in (side.commits, side.wal_kb)]
    return f"| {_format_scenario(row)} | {name} | {' | '.join(cpu + writes)} | {memory} |"
