"""The report's figure and table of the gain from growing against tokens per parameter."""

from collections.abc import Mapping, Sequence

from service.results.numbers import clamp_to_finite
from service.results.report.markup import Column, render_plot, render_section, render_table
from service.results.report.plotting import COLD, WARM, Figure
from service.results.schemas import BudgetResult, Verdict
from service.results.wording import (
    format_difference,
    format_flops,
    format_interval,
    format_speedup,
    format_tokens,
    write_headline,
)

_NOTE = (
    "Each arm and seed trains one constant phase, the trunk. At each budget a run of its own "
    "leaves the trunk and cools down. FLOPs count a run as if it shared nothing: the trunk up to "
    "its branch, and its cooldown."
)
_COLUMNS: tuple[Column[BudgetResult], ...] = (
    Column(title="tpp", text=lambda b: f"{b.tokens_per_param:g}"),
    Column(title="tokens", text=lambda b: format_tokens(b.num_tokens)),
    Column(title="warm - cold", text=lambda b: format_difference(b.verdict)),
    Column(title="95 % interval", text=lambda b: format_interval(b.verdict)),
    Column(
        title="speedup", text=lambda b: format_speedup(b.verdict.speedup if b.verdict else None)
    ),
    Column(title="warm FLOPs", text=lambda b: format_flops(b.costs.warm_flops)),
    Column(title="base counted", text=lambda b: format_flops(b.costs.warm_base_counted_flops)),
    Column(title="cold FLOPs", text=lambda b: format_flops(b.costs.cold_flops)),
    Column(title="verdict", text=lambda b: b.pending or write_headline(b.verdict), kind="text"),
)


def render_budget_section(budgets: Sequence[BudgetResult], figures: Mapping[str, Figure]) -> str:
    """Return the section, or nothing where the target has a single budget."""
    if not budgets:
        return ""
    figure = (
        render_plot("budgets", "Difference: below 0, warm is better")
        if "budgets" in figures
        else ""
    )
    table = render_table(_COLUMNS, budgets)
    return render_section("Gain against tokens per parameter", _NOTE, figure, table)


def draw_budget_figures(budgets: Sequence[BudgetResult]) -> dict[str, Figure]:
    """Return the figure by the id of its element, as soon as a budget has a verdict."""
    figure = draw_gain_by_budget(budgets)
    return {"budgets": figure} if figure["data"] else {}


def draw_gain_by_budget(budgets: Sequence[BudgetResult]) -> Figure:
    """Draw warm - cold against tokens per parameter: the mean with its interval, and each seed."""
    judged = [(b.tokens_per_param, b.verdict) for b in budgets if b.verdict is not None]
    if not judged:
        return {"data": [], "layout": {}}
    zero = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": 0, "y1": 0}
    # Budgets usually double, 5, 10, 20, 40: a logarithmic axis spaces them evenly. The ticks are
    # the budgets themselves, for nothing was measured between them.
    ticks = [budget for budget, _ in judged]
    axis = {"type": "log", "tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}
    layout = {
        "xaxis": axis | {"title": {"text": "tokens per parameter"}},
        "yaxis": {"title": {"text": "warm - cold (nats/token)"}},
        "shapes": [zero | {"line": {"dash": "dot"}}],
        "showlegend": False,
    }
    return {"data": [_make_seed_trace(judged), _make_mean_trace(judged)], "layout": layout}


def _make_seed_trace(judged: Sequence[tuple[float, Verdict]]) -> Figure:
    points = [(budget, p.difference_nats) for budget, v in judged for p in v.pairs]
    return {
        "type": "scatter",
        "mode": "markers",
        "x": [budget for budget, _ in points],
        "y": [difference for _, difference in points],
        "marker": {"color": COLD, "size": 7},
        "hovertemplate": "%{y:+.4f} nats<extra>a seed</extra>",
    }


def _make_mean_trace(judged: Sequence[tuple[float, Verdict]]) -> Figure:
    halves = [
        clamp_to_finite(v.interval_nats.high - v.difference_nats) if v.interval_nats else 0
        for _, v in judged
    ]
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "x": [budget for budget, _ in judged],
        "y": [v.difference_nats for _, v in judged],
        "error_y": {"type": "data", "array": halves, "color": WARM, "thickness": 2, "width": 8},
        "line": {"color": WARM, "width": 2},
        "marker": {"color": WARM, "size": 11, "symbol": "diamond"},
        "hovertemplate": "%{y:+.4f} nats<extra>mean</extra>",
    }
