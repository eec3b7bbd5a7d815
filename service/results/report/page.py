"""A study's results as one HTML page: the verdict, then a section per subject."""

from collections.abc import Iterator, Sequence
from html import escape

from service.results.report.arm_section import render_arm_section
from service.results.report.budget_section import draw_budget_figures, render_budget_section
from service.results.report.document import render_document
from service.results.report.figures import draw_figures
from service.results.report.markup import render_cards
from service.results.report.trial_section import render_trial_section
from service.results.schemas import ReportTrial, StudyResults, Verdict
from service.results.wording import (
    format_difference,
    format_ends,
    format_flops,
    format_nats,
    format_speedup,
    write_budget_prefix,
    write_headline,
)
from service.specs.study import StudySpec


def render_report(
    results: StudyResults, trials: Sequence[ReportTrial], spec: StudySpec
) -> Iterator[bytes]:
    """Return the report of a study as one page, in pieces."""
    figures = draw_figures(results, trials, spec) | draw_budget_figures(results.budgets)
    body = [
        _render_top(results),
        render_budget_section(results.budgets, figures),
        render_arm_section(results, figures),
        render_trial_section(results, trials, spec, figures),
    ]
    return render_document(results.study_name, body, figures)


def _render_top(results: StudyResults) -> str:
    verdict = results.verdict
    tone = _choose_tone(verdict)
    text = _write_text(results)
    return (
        f'<div class="top"><h1>{escape(results.study_name)}</h1><span>{results.state}</span></div>'
        f'<div class="hero {tone}"><strong>{escape(write_headline(verdict))}</strong>'
        f"<p>{escape(text)}</p></div>{render_cards(_list_cards(results))}"
    )


def _write_text(results: StudyResults) -> str:
    """Return the text below the headline: the verdict's sentence without the headline itself."""
    if results.verdict is None:
        text = f"{results.pending}."
    else:
        text = results.verdict.sentence.removeprefix(f"{write_headline(results.verdict)}: ")
    return write_budget_prefix(results) + text[:1].upper() + text[1:]


def _choose_tone(verdict: Verdict | None) -> str:
    headline = write_headline(verdict)
    return {"Growing paid": "good", "Growing did not pay": "bad"}.get(headline, "open")


def _list_cards(results: StudyResults) -> list[tuple[str, str]]:
    cards: list[tuple[str, str]] = []
    if (verdict := results.verdict) is not None:
        cards = _list_verdict_cards(verdict)
    if (best := results.best_trial) is not None:
        cards.append((format_nats(best.val_loss_nats), f"best trial's loss (trial {best.number})"))
    cards.append((format_flops(results.costs.total_flops), "FLOPs in total"))
    return cards


def _list_verdict_cards(verdict: Verdict) -> list[tuple[str, str]]:
    interval, growth = verdict.interval_nats, verdict.growth
    spread = f"95 % {format_ends(interval)}" if interval else "no interval"
    # The literature counts growth in three ways; show all, so that a reader can compare.
    others = f"width {growth.g_width:g}x, non-embedding {growth.g_nonembedding:.2f}x"
    return [
        (format_difference(verdict), f"warm - cold, nats/token ({spread})"),
        *_list_speed_cards(verdict),
        (f"{growth.g_total:.2f}x", f"growth in parameters ({others})"),
    ]


def _list_speed_cards(verdict: Verdict) -> list[tuple[str, str]]:
    if verdict.speedup is None:
        reached = sum(pair.speedup is not None for pair in verdict.pairs)
        return [(f"{reached} of {verdict.seeds}", "seeds where warm reached cold's final loss")]
    return [
        (format_speedup(verdict.speedup), "token speedup, base sunk"),
        (format_speedup(verdict.speedup_base_counted), "FLOPs speedup, base counted"),
    ]
