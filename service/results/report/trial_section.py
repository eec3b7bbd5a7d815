"""The report's section on trials: plots, the best trial, and a table of the best trials."""

from collections.abc import Mapping, Sequence
from html import escape

from service.results.report.figures import (
    MAX_DRAWN_TRIALS,
    MAX_TABLE_TRIALS,
    rank_trials,
    select_dimensions,
)
from service.results.report.markup import (
    Column,
    error_columns,
    render_plot,
    render_section,
    render_table,
)
from service.results.report.plotting import Figure, display_state
from service.results.schemas import BestTrialResult, ReportTrial, StudyResults
from service.results.wording import format_flops, format_nats, format_parameter
from service.specs.study import StudySpec


def render_trial_section(
    results: StudyResults,
    trials: Sequence[ReportTrial],
    spec: StudySpec,
    figures: Mapping[str, Figure],
) -> str:
    """Return the section, or nothing while the study has no trial."""
    titles = {"trials": "Loss by trial", "learning": "Learning curves"}
    titles |= {f"dimension-{name}": f"Loss against {name}" for name in select_dimensions(spec)}
    plots = "".join(
        render_plot(place, title) for place, title in titles.items() if place in figures
    )
    listed = rank_trials(trials)[:MAX_TABLE_TRIALS]
    note = f"{len(trials)} of {results.trials_budget} trials, best first."
    if len(trials) > len(listed):
        note = f"The best {len(listed)} of {len(trials)} trials."
    if len(trials) > MAX_DRAWN_TRIALS:
        note += " The plots show these and an even selection of the other trials, by number."
    return render_section(
        "Trials",
        note if trials else "",
        _render_best_trial(results.best_trial),
        f'<div class="figures">{plots}</div>' if plots else "",
        render_table(_trial_columns(spec, listed), listed) if listed else "",
    )


def _render_best_trial(best: BestTrialResult | None) -> str:
    if best is None:
        return ""
    params = ", ".join(
        f"{name} {format_parameter(value)}" for name, value in sorted(best.params.items())
    )
    source = (
        f" Its checkpoint {best.checkpoint.hash[:12]} is at {best.checkpoint.uri}."
        if best.checkpoint
        else ""
    )
    text = f"The best trial is number {best.number}, with {params}.{source}"
    return f'<p class="note">{escape(text)}</p>'


def _trial_columns(spec: StudySpec, trials: Sequence[ReportTrial]) -> list[Column[ReportTrial]]:
    params: list[Column[ReportTrial]] = [
        Column(title=name, text=lambda t, name=name: format_parameter(t.params.get(name, "")))
        for name in sorted(spec.search_space, key=lambda name: (name != "lr", name))
    ]
    return [
        Column(title="trial", text=lambda t: str(t.number)),
        Column(title="state", text=display_state, kind="state"),
        Column(title="loss", text=lambda t: format_nats(t.val_loss_nats)),
        *params,
        Column(title="FLOPs", text=lambda t: format_flops(t.cost_flops)),
        *error_columns(trials),
    ]
