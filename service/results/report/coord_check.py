"""A coordinate check as one HTML page that needs no network. Pure."""

from collections.abc import Iterator
from math import log10
from typing import Any

from service.results.report.figures import STATE_COLOURS, Figure, log_ticks
from service.results.report.markup import Column, render_plot, render_section, render_table
from service.results.report.page import render_document
from warmcore.specs.coord_check import KINDS, AxisCheck, CoordCheck, Kind

# Of middling brightness throughout: the page is light or dark.
_STEPS = ("#d9a441", "#cb8a4d", "#b37362", "#97637c", "#7a5b93", "#5f5fa6", "#4a72b6", "#3f86c9")
_NOTES = {
    "width": "Under muP a layer's mean |x| after a few steps does not depend on width: its lines "
    "are level. Both axes are logarithmic, a line per step.",
    "depth": "Under CompleteP it does not depend on depth either. What the blocks are drawn with "
    "falls by design as layers are added, and shows until what is learned outweighs it.",
}


def render_coord_check(check: CoordCheck) -> Iterator[bytes]:
    """The whole page, in pieces."""
    sections = [_axis(axis, check) for axis in check.axes]
    drawn = {_place(axis, k): figure(axis, k) for axis in check.axes for k in KINDS}
    return render_document("Coordinate check", [_top(check), *sections], drawn)


def _top(check: CoordCheck) -> str:
    tone, headline = ("good", "Flat") if check.is_flat else ("bad", "Not flat")
    beyond = [
        f"{kind} in {axis.axis} ({found:+.3f})"
        for axis in check.axes
        for kind, found in axis.not_flat(check.tolerance).items()
    ]
    found = f"Beyond {check.tolerance:g}: {', '.join(beyond)}." if beyond else "All slopes within "
    found += "" if beyond else f"{check.tolerance:g}."
    made = (
        f"{check.train.optimizer}, {check.model.parametrization}, lr {check.train.lr:g}, "
        f"seeds {check.num_seeds}, batch {check.train.batch_size} x {check.context} tokens."
    )
    return (
        '<div class="top"><h1>Coordinate check</h1>'
        f"<span>after {check.num_steps} steps</span></div>"
        f'<div class="hero {tone}"><strong>{headline}</strong><p>{found} {made}</p></div>'
    )


def _axis(axis: AxisCheck, check: CoordCheck) -> str:
    plots = "".join(render_plot(_place(axis, kind), _caption(axis, kind)) for kind in KINDS)
    return render_section(
        axis.axis.capitalize(),
        _NOTES[axis.axis],
        render_table(_columns(axis, check.tolerance), KINDS),
        f'<div class="figures">{plots}</div>',
    )


def _place(axis: AxisCheck, kind: Kind) -> str:
    return f"{axis.axis}-{kind}"


def _caption(axis: AxisCheck, kind: Kind) -> str:
    return f"{kind}, slope {_signed(axis.slopes[kind][-1])}"


def _signed(value: float | None) -> str:
    return "none" if value is None else f"{value:+.3f}"


def _columns(axis: AxisCheck, tolerance: float) -> list[Column[Kind]]:
    """Slopes by step; the last one is what is judged."""
    beyond = axis.not_flat(tolerance)
    steps = range(len(axis.slopes[KINDS[0]]))
    return [
        Column(title="layer", text=str, kind="text"),
        *(
            Column[Kind](title=f"step {n}", text=lambda k, n=n: _signed(axis.slopes[k][n]))
            for n in steps
        ),
        Column(title="verdict", text=lambda k: "not flat" if k in beyond else "flat", kind="text"),
    ]


def figure(axis: AxisCheck, kind: Kind) -> Figure:
    """Mean |x| against size, a line per step; a step at which all are 0 has none."""
    steps = axis.means[kind]
    shown = [(step, means) for step, means in enumerate(steps) if all(means)]
    data = [_line(axis, step, means, len(steps)) for step, means in shown]
    sizes = list(axis.sizes)
    xaxis: dict[str, Any] = {"title": {"text": axis.axis}, "type": "log"}
    xaxis |= {"tickvals": sizes, "ticktext": [str(size) for size in sizes]}
    values = [value for _, means in shown for value in means]
    yaxis = {"title": {"text": "mean |x|"}, "type": "log", **_a_decade(values)}
    return {"data": data, "layout": {"xaxis": xaxis, "yaxis": yaxis}}


def _a_decade(values: list[float]) -> dict[str, Any]:
    """Range and ticks of a tenfold axis at least: on a shorter one, noise would look steep."""
    if not values:
        return {}
    low, high = log10(min(values)), log10(max(values))
    reach = max(1.0, 1.15 * (high - low)) / 2
    middle = (low + high) / 2
    ticks = log_ticks(10 ** (middle - reach), 10 ** (middle + reach))
    labels = {"tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}
    return {"range": [middle - reach, middle + reach], **labels}


def _line(axis: AxisCheck, step: int, means: tuple[float, ...], num_steps: int) -> Figure:
    place = round(step * (len(_STEPS) - 1) / max(num_steps - 1, 1))
    colour = STATE_COLOURS["pruned"] if step == 0 else _STEPS[place]
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": f"step {step}",
        "x": list(axis.sizes),
        "y": list(means),
        "line": {"color": colour, "width": 2, "dash": "dot" if step == 0 else "solid"},
        "marker": {"size": 6},
        "hovertemplate": f"%{{y:.4g}} at {axis.axis} %{{x}}",
    }
