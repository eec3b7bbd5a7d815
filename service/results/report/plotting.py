"""Colours, lines and axes that all figures share, as plain Plotly dictionaries. Pure."""

from collections.abc import Sequence
from html import escape
from math import ceil, floor, inf, log10
from typing import Any

from service.results.schemas import ReportTrial, TargetRun

Figure = dict[str, Any]

WARM, COLD = "#e2662b", "#3f86c9"
STATE_COLOURS = {
    "succeeded": "#2f9e77",
    "pruned": "#8b93a1",
    "diverged": "#c2418a",
    "failed": "#d64545",
    "leased": "#d99a1c",
    "queued": "#a8adb8",
    "cancelled": "#6d7380",
}


def display_state(run: ReportTrial | TargetRun) -> str:
    """Return the state to display: `diverged` for a run that diverged, in place of `failed`."""
    return "diverged" if run.diverged else run.state


def make_line(points: Sequence[tuple[int, float]], name: str) -> Figure:
    """Return a line through (tokens, loss) points."""
    return {
        "type": "scatter",
        "x": [tokens for tokens, _ in points],
        "y": [loss for _, loss in points],
        "name": name,
        "hovertemplate": "%{y:.4f} nats<br>%{x:.4s} tokens",
    }


def add_axes(data: list[Figure], x: str, *, log_x: bool = False, **layout: Any) -> Figure:
    """Return a figure of these traces, with the loss on the y axis and `x` as the x axis' title."""
    axis: Figure = {"title": {"text": escape(x)}}
    values = [value for trace in data for value in trace["x"]]
    if log_x and values:
        ticks = log_ticks(min(values), max(values))
        axis |= {"type": "log", "tickvals": ticks, "ticktext": [_format_tick(t) for t in ticks]}
    yaxis = {"title": {"text": "validation loss (nats/token)"}}
    return {"data": data, "layout": {"xaxis": axis, "yaxis": yaxis, **layout}}


def log_ticks(low: float, high: float) -> list[float]:
    """Return 1, 2 and 5 times the powers of ten, from below `low` to above `high`."""
    # For example 0.03 to 0.4: 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5. A log axis of Plotly's own
    # labels the tick at 0.2 with the digit "2" alone.
    decades = range(floor(log10(low)), ceil(log10(high)) + 1)
    ticks = [float(f"{digit}e{decade}") for decade in decades for digit in (1, 2, 5)]
    return [tick for tick in ticks if 0 < tick < inf]


def _format_tick(value: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"
