"""The report's figures as plain Plotly dictionaries. Pure; colours and fonts are the page's.

Plotly reads text as its own markup, so whatever a user may have written is escaped.
"""

from collections.abc import Callable, Sequence
from html import escape
from itertools import accumulate
from math import ceil, floor, inf, log10
from typing import Any

from service.protocol import Arm
from service.results.numbers import clamp_to_finite, thin_points
from service.results.schemas import ReportTrial, StudyResults, TargetRun, Verdict
from service.results.verdict import select_last_rung
from service.results.wording import format_arm, format_nats, format_parameter
from service.specs.study import StudySpec

Figure = dict[str, Any]

WARM, COLD = "#e2662b", "#3f86c9"
_ARM_COLOURS: dict[Arm, str] = {"warm": WARM, "cold": COLD}
_ARM_SYMBOLS: dict[Arm, str] = {"warm": "circle", "cold": "square"}
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
_AVERAGES = {"ema": 0.8, "swa": 0.5}  # opacities
STATE_COLOURS = {
    "succeeded": "#2f9e77",
    "pruned": "#8b93a1",
    "diverged": "#c2418a",
    "failed": "#d64545",
    "leased": "#d99a1c",
    "queued": "#a8adb8",
    "cancelled": "#6d7380",
}
MAX_DIMENSIONS = 6
MAX_TABLE_TRIALS = 500
MAX_DRAWN_TRIALS = 2000


def display_state(trial: ReportTrial | TargetRun) -> str:
    """The state as a reader cares for it: a diverged run is not just any failure."""
    return "diverged" if trial.diverged else trial.state


def draw_figures(
    results: StudyResults, trials: Sequence[ReportTrial], spec: StudySpec
) -> dict[str, Figure]:
    """Every figure that there is something to draw in, by the id of its place on the page."""
    own = select_last_rung([t for t in results.targets if t.launch == 0])
    shown = select_drawn_trials(trials)
    drawn = {
        "arms": draw_arm_curves(own),
        "differences": draw_differences(results.verdict),
        "trials": draw_trial_losses(shown, trials),
        "learning": draw_learning_curves(trials),
    }
    for name in select_dimensions(spec):
        log = getattr(spec.search_space[name], "log", False)
        drawn[f"dimension-{name}"] = draw_loss_against(shown, name, log=log)
    return {place: figure for place, figure in drawn.items() if figure["data"]}


def rank_trials(trials: Sequence[ReportTrial]) -> list[ReportTrial]:
    """The succeeded ones by loss, then the others."""

    def rank(trial: ReportTrial) -> tuple[bool, float, int]:
        loss = trial.val_loss_nats
        return trial.state != "succeeded", inf if loss is None else loss, trial.number

    return sorted(trials, key=rank)


def select_drawn_trials(trials: Sequence[ReportTrial]) -> list[ReportTrial]:
    """What can be drawn: the best ones that are listed, and others evenly by number."""
    best = {trial.number for trial in rank_trials(trials)[:MAX_TABLE_TRIALS]}
    others = [trial for trial in trials if trial.number not in best]
    among = {trial.number for trial in thin_points(others, MAX_DRAWN_TRIALS - MAX_TABLE_TRIALS)}
    return [trial for trial in trials if trial.number in best | among]


def select_dimensions(spec: StudySpec) -> list[str]:
    """The parameters to draw, the learning rate first."""
    names = sorted(spec.search_space, key=lambda name: (name != "lr", name))
    return names[:MAX_DIMENSIONS]


def draw_arm_curves(runs: Sequence[TargetRun]) -> Figure:
    """Validation loss against tokens: a colour per arm, a dash per seed; averages thin."""
    data = [_arm_curve(run) for run in runs if run.curve]
    data += [_average_curve(run, name) for run in runs for name in _AVERAGES]
    return _with_axes([trace for trace in data if trace["x"]], "tokens", log_x=True)


def _arm_curve(run: TargetRun) -> Figure:
    """A branch's own part alone: what is before is its trunk's line, and so is its legend."""
    name = f"{format_arm(run)}, seed {run.seed_number}"
    points = [p for p in run.curve if p.tokens >= max(1, run.trunk_tokens)]
    return {
        **_line([(p.tokens, p.val_loss_nats) for p in points], name),
        "mode": "lines+markers",
        "showlegend": run.branch == 0,
        "line": {
            "color": _ARM_COLOURS[run.arm],
            "dash": _DASHES[run.seed_number % len(_DASHES)],
            "width": 2,
        },
        "marker": {"symbol": _ARM_SYMBOLS[run.arm], "size": 6},
    }


def _average_curve(run: TargetRun, name: str) -> Figure:
    losses = [(p.tokens, getattr(p, f"{name}_val_loss_nats")) for p in run.curve if p.tokens]
    points = [(tokens, loss) for tokens, loss in losses if loss is not None]
    trace = _line(points, f"{run.arm}, seed {run.seed_number}, {name.upper()}")
    color = {"color": _ARM_COLOURS[run.arm], "width": 1}
    return trace | {"mode": "lines", "line": color, "opacity": _AVERAGES[name]}


def _line(points: Sequence[tuple[int, float]], name: str) -> Figure:
    return {
        "type": "scatter",
        "x": [tokens for tokens, _ in points],
        "y": [loss for _, loss in points],
        "name": name,
        "hovertemplate": "%{y:.4f} nats<br>%{x:.4s} tokens",
    }


def draw_differences(verdict: Verdict | None) -> Figure:
    """Warm - cold of each seed, and the mean with its interval: does it keep clear of 0?"""
    if verdict is None:
        return {"data": [], "layout": {}}
    half = 0.0
    if verdict.interval_nats is not None:
        half = clamp_to_finite(verdict.interval_nats.high - verdict.difference_nats)
    seeds = {
        "type": "scatter",
        "mode": "markers",
        "name": "seeds",
        "x": [pair.difference_nats for pair in verdict.pairs],
        "y": [f"seed {pair.seed_number}" for pair in verdict.pairs],
        "marker": {"color": WARM, "size": 9},
        "hovertemplate": "%{x:+.4f} nats<extra></extra>",
    }
    mean = {
        "x": [verdict.difference_nats],
        "y": ["mean"],
        "marker": {"color": WARM, "size": 12, "symbol": "diamond"},
        "error_x": {"type": "data", "array": [half], "color": WARM, "thickness": 2, "width": 8},
    }
    zero = {
        "type": "line",
        "x0": 0,
        "x1": 0,
        "yref": "paper",
        "y0": 0,
        "y1": 1,
        "line": {"dash": "dot"},
    }
    axis = {"title": {"text": "warm - cold (nats/token)"}}
    layout = {"xaxis": axis, "yaxis": {"type": "category"}, "shapes": [zero], "showlegend": False}
    return {"data": [seeds, seeds | mean], "layout": layout}


def draw_trial_losses(shown: Sequence[ReportTrial], trials: Sequence[ReportTrial]) -> Figure:
    """Final loss by trial number, coloured by state, and the best so far, of all, as a line."""
    data = [*_by_state(shown, lambda trial: trial.number), _best_so_far(trials)]
    return _with_axes([trace for trace in data if trace["x"]], "trial")


def draw_loss_against(trials: Sequence[ReportTrial], name: str, *, log: bool) -> Figure:
    """Final loss against one parameter."""
    having = [trial for trial in trials if name in trial.params]
    data = _by_state(having, lambda trial: _coordinate(trial.params[name]))
    return _with_axes(data, name, log_x=log, showlegend=False)


def _coordinate(value: object) -> float | str:
    """Numbers as they are, anything else as a category."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    return escape(str(value))


def _by_state(
    trials: Sequence[ReportTrial], x_of: Callable[[ReportTrial], float | str]
) -> list[Figure]:
    traces: list[Figure] = []
    for state, colour in STATE_COLOURS.items():
        here = [t for t in trials if display_state(t) == state and t.val_loss_nats is not None]
        if here:
            traces.append(
                {
                    "type": "scatter",
                    "mode": "markers",
                    "name": state,
                    "x": [x_of(trial) for trial in here],
                    "y": [trial.val_loss_nats for trial in here],
                    "text": [_hover(trial) for trial in here],
                    "hovertemplate": "%{text}<extra></extra>",
                    "marker": {"color": colour, "size": 9, "opacity": 0.9},
                }
            )
    return traces


def _hover(trial: ReportTrial) -> str:
    loss = "" if trial.val_loss_nats is None else f"{format_nats(trial.val_loss_nats)} nats"
    params = [
        f"{escape(k)} = {escape(format_parameter(v))}" for k, v in sorted(trial.params.items())
    ]
    return "<br>".join([f"<b>trial {trial.number}</b> ({display_state(trial)})", loss, *params])


def _best_so_far(trials: Sequence[ReportTrial]) -> Figure:
    found = [
        (trial.number, trial.val_loss_nats)
        for trial in trials
        if trial.state == "succeeded" and trial.val_loss_nats is not None
    ]
    best = list(accumulate((loss for _, loss in found), min))
    steps = [i for i, loss in enumerate(best) if i in (0, len(best) - 1) or loss < best[i - 1]]
    return {
        "type": "scatter",
        "mode": "lines",
        "name": "best so far",
        "x": [found[i][0] for i in steps],
        "y": [best[i] for i in steps],
        "line": {"color": STATE_COLOURS["succeeded"], "width": 1.5, "shape": "hv", "dash": "dot"},
        "hoverinfo": "skip",
    }


def draw_learning_curves(trials: Sequence[ReportTrial]) -> Figure:
    """Validation loss against tokens, one line a trial; diverged ones do not stretch the axis."""
    shown = [trial for trial in trials if trial.curve]
    losses = [p.val_loss_nats for t in shown if not t.diverged for p in t.curve if p.tokens]
    figure = _with_axes([_learning_curve(t) for t in shown], "tokens", log_x=True, showlegend=False)
    if losses:
        pad = 0.05 * clamp_to_finite(max(losses) - min(losses))
        reach = [clamp_to_finite(min(losses) - pad), clamp_to_finite(max(losses) + pad)]
        figure["layout"]["yaxis"]["range"] = reach
    return figure


def _learning_curve(trial: ReportTrial) -> Figure:
    points = [(p.tokens, p.val_loss_nats) for p in trial.curve if p.tokens > 0]
    return {
        **_line(points, f"trial {trial.number}"),
        "mode": "lines+markers",
        "line": {"color": STATE_COLOURS[display_state(trial)], "width": 1.5},
        "marker": {"size": 4},
        "opacity": 0.75,
    }


def _with_axes(data: list[Figure], x: str, *, log_x: bool = False, **layout: Any) -> Figure:
    axis: Figure = {"title": {"text": escape(x)}}
    values = [value for trace in data for value in trace["x"]]
    if log_x and values:
        ticks = log_ticks(min(values), max(values))
        axis |= {"type": "log", "tickvals": ticks, "ticktext": [_tick(tick) for tick in ticks]}
    yaxis = {"title": {"text": "validation loss (nats/token)"}}
    return {"data": data, "layout": {"xaxis": axis, "yaxis": yaxis, **layout}}


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten from below `low` to above `high`."""
    decades = range(floor(log10(low)), ceil(log10(high)) + 1)
    ticks = [float(f"{digit}e{decade}") for decade in decades for digit in (1, 2, 5)]
    return [tick for tick in ticks if 0 < tick < inf]


def _tick(value: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"
