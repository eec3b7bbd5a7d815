"""The report's figures as plain Plotly dictionaries. Pure; the page sets fonts and axis colours.

Plotly reads text as its own markup, so every text from a user is escaped.
"""

from collections.abc import Callable, Sequence
from html import escape
from itertools import accumulate
from math import inf

from service.protocol import Arm
from service.results.numbers import clamp_to_finite, thin_points
from service.results.report.plotting import (
    COLD,
    STATE_COLOURS,
    WARM,
    Figure,
    add_axes,
    display_state,
    make_line,
)
from service.results.schemas import ReportTrial, StudyResults, TargetRun, Verdict
from service.results.verdict import select_last_rung
from service.results.wording import format_arm, format_nats, format_parameter
from service.specs.study import StudySpec

_ARM_COLOURS: dict[Arm, str] = {"warm": WARM, "cold": COLD}
_ARM_SYMBOLS: dict[Arm, str] = {"warm": "circle", "cold": "square"}
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
_AVERAGES = {"ema": 0.8, "swa": 0.5}  # opacities
MAX_DIMENSIONS = 6
MAX_TABLE_TRIALS = 500
MAX_DRAWN_TRIALS = 2000


def draw_figures(
    results: StudyResults, trials: Sequence[ReportTrial], spec: StudySpec
) -> dict[str, Figure]:
    """Return the figures by the id of their element; a figure without data is left out."""
    own = select_last_rung([t for t in results.targets if t.launch == 0])
    drawn_trials = select_drawn_trials(trials)
    figures = {
        "arms": draw_arm_curves(own),
        "differences": draw_differences(results.verdict),
        "trials": draw_trial_losses(drawn_trials, trials),
        "learning": draw_learning_curves(trials),
    }
    for name in select_dimensions(spec):
        log = getattr(spec.search_space[name], "log", False)
        figures[f"dimension-{name}"] = draw_loss_against(drawn_trials, name, log=log)
    return {place: figure for place, figure in figures.items() if figure["data"]}


def rank_trials(trials: Sequence[ReportTrial]) -> list[ReportTrial]:
    """Return the succeeded trials by loss, then the other trials."""

    def rank(trial: ReportTrial) -> tuple[bool, float, int]:
        loss = trial.val_loss_nats
        return trial.state != "succeeded", inf if loss is None else loss, trial.number

    return sorted(trials, key=rank)


# A study may have 10 000 trials, more than a browser draws at ease. For example of 4001 trials the
# plots show the best 500, the same as the table, and of the other 3501 every third by number: 1167
# points that keep the shape of the search over time.
def select_drawn_trials(trials: Sequence[ReportTrial]) -> list[ReportTrial]:
    """Return the trials to draw: the best trials, and an even selection of the others by number."""
    best = {trial.number for trial in rank_trials(trials)[:MAX_TABLE_TRIALS]}
    others = [trial for trial in trials if trial.number not in best]
    among = {trial.number for trial in thin_points(others, MAX_DRAWN_TRIALS - MAX_TABLE_TRIALS)}
    return [trial for trial in trials if trial.number in best | among]


def select_dimensions(spec: StudySpec) -> list[str]:
    """Return the names of the parameters to draw, the learning rate first."""
    names = sorted(spec.search_space, key=lambda name: (name != "lr", name))
    return names[:MAX_DIMENSIONS]


def draw_arm_curves(runs: Sequence[TargetRun]) -> Figure:
    """Draw validation loss against tokens: a colour per arm, a dash per seed, averages thin."""
    data = [_make_arm_trace(run) for run in runs if run.curve]
    data += [_make_average_trace(run, name) for run in runs for name in _AVERAGES]
    return add_axes([trace for trace in data if trace["x"]], "tokens", log_x=True)


def _make_arm_trace(run: TargetRun) -> Figure:
    name = f"{format_arm(run)}, seed {run.seed_number}"
    # A branch's curve begins with its trunk's points. The trunk draws those as its own line, so a
    # branch that left at 500 tokens is drawn from 500 on, without an entry in the legend.
    points = [p for p in run.curve if p.tokens >= max(1, run.trunk_tokens)]
    return {
        **make_line([(p.tokens, p.val_loss_nats) for p in points], name),
        "mode": "lines+markers",
        "showlegend": run.branch == 0,
        "line": {
            "color": _ARM_COLOURS[run.arm],
            "dash": _DASHES[run.seed_number % len(_DASHES)],
            "width": 2,
        },
        "marker": {"symbol": _ARM_SYMBOLS[run.arm], "size": 6},
    }


def _make_average_trace(run: TargetRun, name: str) -> Figure:
    losses = [(p.tokens, getattr(p, f"{name}_val_loss_nats")) for p in run.curve if p.tokens]
    points = [(tokens, loss) for tokens, loss in losses if loss is not None]
    trace = make_line(points, f"{run.arm}, seed {run.seed_number}, {name.upper()}")
    color = {"color": _ARM_COLOURS[run.arm], "width": 1}
    return trace | {"mode": "lines", "line": color, "opacity": _AVERAGES[name]}


def draw_differences(verdict: Verdict | None) -> Figure:
    """Draw warm - cold of each seed, and the mean with its interval beside a line at 0."""
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


def draw_trial_losses(drawn: Sequence[ReportTrial], trials: Sequence[ReportTrial]) -> Figure:
    """Draw the final loss of the drawn trials by number, and the best loss so far of all trials."""
    data = [*_make_state_traces(drawn, lambda trial: trial.number), _make_record_trace(trials)]
    return add_axes([trace for trace in data if trace["x"]], "trial")


def draw_loss_against(trials: Sequence[ReportTrial], name: str, *, log: bool) -> Figure:
    """Draw the final loss against the parameter of this name."""
    having = [trial for trial in trials if name in trial.params]
    data = _make_state_traces(having, lambda trial: _to_coordinate(trial.params[name]))
    return add_axes(data, name, log_x=log, showlegend=False)


def _to_coordinate(value: object) -> float | str:
    """Return a number unchanged, and any other value as the name of a category."""
    # Python's True is an int, and Plotly would put it at 1.
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    return escape(str(value))


def _make_state_traces(
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
                    "text": [_write_hover_text(trial) for trial in here],
                    "hovertemplate": "%{text}<extra></extra>",
                    "marker": {"color": colour, "size": 9, "opacity": 0.9},
                }
            )
    return traces


def _write_hover_text(trial: ReportTrial) -> str:
    loss = "" if trial.val_loss_nats is None else f"{format_nats(trial.val_loss_nats)} nats"
    params = [
        f"{escape(k)} = {escape(format_parameter(v))}" for k, v in sorted(trial.params.items())
    ]
    return "<br>".join([f"<b>trial {trial.number}</b> ({display_state(trial)})", loss, *params])


def _make_record_trace(trials: Sequence[ReportTrial]) -> Figure:
    succeeded = [
        (trial.number, trial.val_loss_nats)
        for trial in trials
        if trial.state == "succeeded" and trial.val_loss_nats is not None
    ]
    best = list(accumulate((loss for _, loss in succeeded), min))
    # A step line needs only its corners. For example losses 3, 4, 2, 5 have the records 3, 3, 2, 2:
    # the first trial, the third, where the record falls, and the last, where the line ends.
    steps = [i for i, loss in enumerate(best) if i in (0, len(best) - 1) or loss < best[i - 1]]
    return {
        "type": "scatter",
        "mode": "lines",
        "name": "best so far",
        "x": [succeeded[i][0] for i in steps],
        "y": [best[i] for i in steps],
        "line": {"color": STATE_COLOURS["succeeded"], "width": 1.5, "shape": "hv", "dash": "dot"},
        "hoverinfo": "skip",
    }


def draw_learning_curves(trials: Sequence[ReportTrial]) -> Figure:
    """Draw validation loss against tokens, a line per trial.

    The loss axis fits the trials that did not diverge.
    """
    curved = [trial for trial in trials if trial.curve]
    losses = [p.val_loss_nats for t in curved if not t.diverged for p in t.curve if p.tokens]
    data = [_make_learning_trace(trial) for trial in curved]
    figure = add_axes(data, "tokens", log_x=True, showlegend=False)
    # One trial that ends at 80 nats would press all others, at 2 to 4 nats, into a flat line.
    if losses:
        pad = 0.05 * clamp_to_finite(max(losses) - min(losses))
        reach = [clamp_to_finite(min(losses) - pad), clamp_to_finite(max(losses) + pad)]
        figure["layout"]["yaxis"]["range"] = reach
    return figure


def _make_learning_trace(trial: ReportTrial) -> Figure:
    points = [(p.tokens, p.val_loss_nats) for p in trial.curve if p.tokens > 0]
    return {
        **make_line(points, f"trial {trial.number}"),
        "mode": "lines+markers",
        "line": {"color": STATE_COLOURS[display_state(trial)], "width": 1.5},
        "marker": {"size": 4},
        "opacity": 0.75,
    }
