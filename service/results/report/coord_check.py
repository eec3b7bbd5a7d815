"""A coordinate check as one HTML page that needs no network. Pure."""

from collections.abc import Iterator
from math import log10
from typing import Any

from service.results.report.document import render_document
from service.results.report.markup import Column, render_plot, render_section, render_table
from service.results.report.plotting import STATE_COLOURS, Figure, log_ticks
from warmcore.specs.coord_check import KINDS, AxisCheck, CoordCheck, Kind

# Colours of medium brightness: a line is legible on the light and on the dark page.
_STEPS = ("#d9a441", "#cb8a4d", "#b37362", "#97637c", "#7a5b93", "#5f5fa6", "#4a72b6", "#3f86c9")
_NOTES = {
    "width": "Under muP a layer's mean |x| after a few steps does not depend on the width, so the "
    "lines are level. Both axes are logarithmic; each line is a step.",
    "depth": "Under CompleteP the mean |x| does not depend on the depth either. The contribution "
    "of the blocks' initial weights shrinks by design as layers are added. It is visible until "
    "the learned part is larger.",
}


def render_coord_check(check: CoordCheck) -> Iterator[bytes]:
    """Return the page of a coordinate check, in pieces."""
    sections = [_render_axis(axis, check) for axis in check.axes]
    figures = {_plot_id(axis, k): draw_means(axis, k) for axis in check.axes for k in KINDS}
    return render_document("Coordinate check", [_render_top(check), *sections], figures)


def _render_top(check: CoordCheck) -> str:
    tone, headline = ("good", "Flat") if check.is_flat else ("bad", "Not flat")
    beyond = [
        f"{kind} in {axis.axis} ({slope:+.3f})"
        for axis in check.axes
        for kind, slope in axis.find_steep_kinds(check.tolerance).items()
    ]
    limit = f"{check.tolerance:g}"
    finding = f"Slopes beyond {limit}: {', '.join(beyond)}." if beyond else ""
    finding = finding or f"All slopes are within {limit}."
    setup = (
        f"{check.train.optimizer}, {check.model.parametrization}, lr {check.train.lr:g}, "
        f"seeds {check.num_seeds}, batch {check.train.batch_size} x {check.context} tokens."
    )
    return (
        '<div class="top"><h1>Coordinate check</h1>'
        f"<span>after {check.num_steps} steps</span></div>"
        f'<div class="hero {tone}"><strong>{headline}</strong><p>{finding} {setup}</p></div>'
    )


def _render_axis(axis: AxisCheck, check: CoordCheck) -> str:
    plots = "".join(render_plot(_plot_id(axis, kind), _write_caption(axis, kind)) for kind in KINDS)
    return render_section(
        axis.axis.capitalize(),
        _NOTES[axis.axis],
        render_table(_slope_columns(axis, check.tolerance), KINDS),
        f'<div class="figures">{plots}</div>',
    )


def _plot_id(axis: AxisCheck, kind: Kind) -> str:
    return f"{axis.axis}-{kind}"


def _write_caption(axis: AxisCheck, kind: Kind) -> str:
    return f"{kind}, slope {_format_slope(axis.slopes[kind][-1])}"


def _format_slope(value: float | None) -> str:
    return "none" if value is None else f"{value:+.3f}"


def _slope_columns(axis: AxisCheck, tolerance: float) -> list[Column[Kind]]:
    """Return a column of slopes per step; the verdict judges the last step."""
    beyond = axis.find_steep_kinds(tolerance)
    steps = range(len(axis.slopes[KINDS[0]]))
    return [
        Column(title="layer", text=str, kind="text"),
        *(
            Column[Kind](title=f"step {n}", text=lambda k, n=n: _format_slope(axis.slopes[k][n]))
            for n in steps
        ),
        Column(title="verdict", text=lambda k: "not flat" if k in beyond else "flat", kind="text"),
    ]


def draw_means(axis: AxisCheck, kind: Kind) -> Figure:
    """Draw mean |x| against size, a line per step; a step with a mean of 0 has no line."""
    steps = axis.means[kind]
    nonzero = [(step, means) for step, means in enumerate(steps) if all(means)]
    data = [_make_step_trace(axis, step, means, len(steps)) for step, means in nonzero]
    sizes = list(axis.sizes)
    xaxis: dict[str, Any] = {"title": {"text": axis.axis}, "type": "log"}
    xaxis |= {"tickvals": sizes, "ticktext": [str(size) for size in sizes]}
    values = [value for _, means in nonzero for value in means]
    yaxis = {"title": {"text": "mean |x|"}, "type": "log", **_span_decade(values)}
    return {"data": data, "layout": {"xaxis": xaxis, "yaxis": yaxis}}


def _span_decade(values: list[float]) -> dict[str, Any]:
    """Return range and ticks of a log axis that spans a factor of 10 at least."""
    if not values:
        return {}
    # Means from 0.98 to 1.02 are flat. An axis of only that range would show noise as steep lines;
    # this axis goes from 0.32 to 3.2. Beyond a decade the range is 15 % more than the values span.
    low, high = log10(min(values)), log10(max(values))
    reach = max(1.0, 1.15 * (high - low)) / 2
    middle = (low + high) / 2
    ticks = log_ticks(10 ** (middle - reach), 10 ** (middle + reach))
    labels = {"tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}
    return {"range": [middle - reach, middle + reach], **labels}


def _make_step_trace(
    axis: AxisCheck, step: int, means: tuple[float, ...], num_steps: int
) -> Figure:
    # Spread the steps over the palette: step 0 of 5 has the first colour, step 4 the last.
    place = round(step * (len(_STEPS) - 1) / max(num_steps - 1, 1))
    # Before training nothing is learned: step 0 is grey and dotted.
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
