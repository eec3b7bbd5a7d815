"""A study's results as one HTML page that needs no network: style, script and data stand inside."""

import base64
import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from html import escape
from importlib.resources import files
from itertools import chain
from string import Template
from typing import Any

from service.results.report.budget_section import draw_budget_figures, render_budget_section
from service.results.report.figures import (
    MAX_DRAWN_TRIALS,
    MAX_TABLE_TRIALS,
    Figure,
    display_state,
    draw_figures,
    rank_trials,
    select_dimensions,
)
from service.results.report.markup import (
    Column,
    render_cards,
    render_plot,
    render_section,
    render_table,
)
from service.results.schemas import (
    BestTrialResult,
    Costs,
    ReportTrial,
    SeedPair,
    StudyResults,
    TargetRun,
    Verdict,
)
from service.results.wording import (
    format_arm,
    format_difference,
    format_direction,
    format_ends,
    format_flops,
    format_nats,
    format_parameter,
    format_speedup,
    format_tokens,
    shared_costs,
    write_budget_prefix,
    write_headline,
)
from service.specs.study import StudySpec

_PIECE_BYTES = 2**18


def render_report(
    results: StudyResults, trials: Sequence[ReportTrial], spec: StudySpec
) -> Iterator[bytes]:
    """The whole page, in pieces: Plotly's 5 MB pass from disk to socket and are never held."""
    drawn = draw_figures(results, trials, spec) | draw_budget_figures(results.budgets)
    gain = render_budget_section(results.budgets, drawn)
    body = [_top(results), gain, _arms(results, drawn), _trials(results, trials, spec, drawn)]
    return render_document(results.study_name, body, drawn)


def render_document(title: str, body: Sequence[str], drawn: dict[str, Figure]) -> Iterator[bytes]:
    """A page of these parts, with the figures drawn in their places."""
    before, after = _asset("page.html").split("$plotly")
    head = Template(before).substitute(
        title=f"{escape(title)} · warmscale",
        scripts=_hash_scripts(),
        style=_asset("page.css"),
        body="\n".join(body),
        figures=_embedded(drawn),
    )
    tail = Template(after).substitute(script=_asset("page.js"))
    return chain([head.encode()], _read_plotly(), [tail.encode()])


@functools.cache
def _hash_scripts() -> str:
    """The page's scripts by their hashes: the browser runs no other, whatever a name may hold."""
    plotly = hashlib.sha256()
    for piece in _read_plotly():
        plotly.update(piece)
    digests = (plotly.digest(), hashlib.sha256(_asset("page.js").encode()).digest())
    return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)


def _read_plotly() -> Iterator[bytes]:
    with files("plotly").joinpath("package_data", "plotly.min.js").open("rb") as script:
        while piece := script.read(_PIECE_BYTES):
            yield piece


def _asset(name: str) -> str:
    return files("service.results.report").joinpath("assets", name).read_text(encoding="utf-8")


def _embedded(drawn: dict[str, Figure]) -> str:
    """JSON that cannot end the script element that it stands in."""
    return json.dumps(drawn, allow_nan=False).replace("<", "\\u003c")


def _top(results: StudyResults) -> str:
    verdict = results.verdict
    tone = _tone(verdict)
    text = _sentence(results)
    return (
        f'<div class="top"><h1>{escape(results.study_name)}</h1><span>{results.state}</span></div>'
        f'<div class="hero {tone}"><strong>{escape(write_headline(verdict))}</strong>'
        f"<p>{escape(text)}</p></div>{render_cards(_figures_of(results))}"
    )


def _sentence(results: StudyResults) -> str:
    """The verdict's sentence below its headline, which it need not repeat."""
    if results.verdict is None:
        text = f"{results.pending}."
    else:
        text = results.verdict.sentence.removeprefix(f"{write_headline(results.verdict)}: ")
    return write_budget_prefix(results) + text[:1].upper() + text[1:]


def _tone(verdict: Verdict | None) -> str:
    found = write_headline(verdict)
    return {"Growing paid": "good", "Growing did not pay": "bad"}.get(found, "open")


def _figures_of(results: StudyResults) -> list[tuple[str, str]]:
    shown: list[tuple[str, str]] = []
    if (verdict := results.verdict) is not None:
        shown = _verdict_figures(verdict)
    if (best := results.best_trial) is not None:
        shown.append((format_nats(best.val_loss_nats), f"best trial's loss (trial {best.number})"))
    shown.append((format_flops(results.costs.total_flops), "FLOPs in all"))
    return shown


def _verdict_figures(verdict: Verdict) -> list[tuple[str, str]]:
    interval, growth = verdict.interval_nats, verdict.growth
    spread = f"95 % {format_ends(interval)}" if interval else "no interval"
    others = f"width {growth.g_width:g}x, non-embedding {growth.g_nonembedding:.2f}x"
    return [
        (format_difference(verdict), f"warm - cold, nats/token ({spread})"),
        *_speed_figures(verdict),
        (f"{growth.g_total:.2f}x", f"growth in parameters ({others})"),
    ]


def _speed_figures(verdict: Verdict) -> list[tuple[str, str]]:
    if verdict.speedup is None:
        reached = sum(pair.speedup is not None for pair in verdict.pairs)
        return [(f"{reached} of {verdict.seeds}", "seeds where warm reached cold's final loss")]
    return [
        (format_speedup(verdict.speedup), "token speedup, base sunk"),
        (format_speedup(verdict.speedup_base_counted), "FLOPs speedup, base counted"),
    ]


def _arms(results: StudyResults, drawn: dict[str, Figure]) -> str:
    curves = render_plot("arms", "Validation loss", shape="tall") if "arms" in drawn else ""
    spread = (
        render_plot("differences", "Difference: left of 0, warm is better", shape="low")
        if "differences" in drawn
        else ""
    )
    pairs = results.verdict.pairs if results.verdict else ()
    note = (
        "The same target, budget, data order and seed, once grown from the best trial's checkpoint "
        "(warm) and once from a fresh initialization (cold). Tokens on a logarithmic scale."
    )
    if results.budgets:
        note += f" The pairs are those at {results.budgets[-1].tokens_per_param:g} tpp."
    return render_section(
        "Warm against cold",
        note if results.targets else "",
        curves,
        render_table(_PAIR_COLUMNS, pairs) if pairs else "",
        render_table(_target_columns(results.targets), results.targets) if results.targets else "",
        f'<div class="figures">{spread}{_costs(results.costs)}</div>' if results.targets else "",
    )


_PAIR_COLUMNS: tuple[Column[SeedPair], ...] = (
    Column(title="seed", text=lambda p: str(p.seed_number)),
    Column(title="warm loss", text=lambda p: format_nats(p.warm_loss_nats)),
    Column(title="cold loss", text=lambda p: format_nats(p.cold_loss_nats)),
    Column(title="warm is", text=lambda p: format_direction(p.difference_nats)),
    Column(title="tokens to cold's loss", text=lambda p: format_tokens(p.tokens_to_cold_loss)),
    Column(title="speedup", text=lambda p: format_speedup(p.speedup)),
)


def _target_columns(runs: Sequence[TargetRun]) -> list[Column[TargetRun]]:
    rung: Column[TargetRun] = Column(title="rung", text=lambda r: str(r.rung))
    return [
        Column(title="target run", text=lambda r: r.run_id, kind="code"),
        Column(title="arm", text=format_arm, kind="text"),
        *([rung] if any(r.rung for r in runs) else []),
        Column(title="seed", text=lambda r: str(r.seed_number)),
        Column(title="state", text=display_state, kind="state"),
        Column(title="loss", text=lambda r: format_nats(r.val_loss_nats)),
        *_average_columns(runs),
        Column(title="tokens", text=lambda r: format_tokens(r.tokens)),
        Column(title="FLOPs", text=lambda r: format_flops(r.cost_flops)),
        Column(title="grown from", text=lambda r: (r.base_hash or "")[:12], kind="code"),
        *_error_column(runs),
    ]


def _average_columns(runs: Sequence[TargetRun]) -> list[Column[TargetRun]]:
    """The newest loss of averaged weights, where any run keeps them."""

    def newest(run: TargetRun, field: str) -> float | None:
        return getattr(run.curve[-1], field) if run.curve else None

    fields = {"EMA loss": "ema_val_loss_nats", "SWA loss": "swa_val_loss_nats"}
    return [
        Column(title=title, text=lambda run, field=field: format_nats(newest(run, field)))
        for title, field in fields.items()
        if any(newest(run, field) is not None for run in runs)
    ]


def _error_column(runs: Sequence[TargetRun] | Sequence[ReportTrial]) -> list[Column[Any]]:
    """A column for errors where there is one to show."""
    errors = any(run.error for run in runs)
    return [Column(title="error", text=lambda run: run.error or "", kind="long")] if errors else []


def _costs(costs: Costs) -> str:
    rows = [
        ("one warm run, the base sunk", costs.warm_flops),
        ("one warm run, the base counted", costs.warm_base_counted_flops),
        ("one cold run", costs.cold_flops),
        ("the base: the best trial's own training", costs.base_flops),
        ("the search: all trials", costs.search_flops),
        *shared_costs(costs),
        ("everything this study ran", costs.total_flops),
    ]
    columns: tuple[Column[tuple[str, float | None]], ...] = (
        Column(title="cost", text=lambda row: row[0], kind="text"),
        Column(title="FLOPs", text=lambda row: format_flops(row[1])),
    )
    return render_table(columns, rows)


def _trials(
    results: StudyResults,
    trials: Sequence[ReportTrial],
    spec: StudySpec,
    drawn: dict[str, Figure],
) -> str:
    titles = {"trials": "Loss by trial", "learning": "Learning curves"}
    titles |= {f"dimension-{name}": f"Loss against {name}" for name in select_dimensions(spec)}
    plots = "".join(render_plot(place, title) for place, title in titles.items() if place in drawn)
    shown = rank_trials(trials)[:MAX_TABLE_TRIALS]
    note = f"{len(trials)} of {results.trials_budget} trials, best first."
    if len(trials) > len(shown):
        note = f"The best {len(shown)} of {len(trials)} trials."
    if len(trials) > MAX_DRAWN_TRIALS:
        note += " Drawn are these and others, evenly by number."
    return render_section(
        "Trials",
        note if trials else "",
        _best(results.best_trial),
        f'<div class="figures">{plots}</div>' if plots else "",
        render_table(_trial_columns(spec, shown), shown) if shown else "",
    )


def _best(best: BestTrialResult | None) -> str:
    if best is None:
        return ""
    params = ", ".join(
        f"{name} {format_parameter(value)}" for name, value in sorted(best.params.items())
    )
    source = (
        f" Checkpoint {best.checkpoint.hash[:12]} at {best.checkpoint.uri}."
        if best.checkpoint
        else ""
    )
    text = f"The best is trial {best.number} with {params}.{source}"
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
        *_error_column(trials),
    ]
