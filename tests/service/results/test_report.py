import base64
import hashlib
import itertools
import json
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.results.costs import compute_costs
from service.results.report import document
from service.results.report import page as report
from service.results.report.figures import (
    MAX_DRAWN_TRIALS,
    MAX_TABLE_TRIALS,
    draw_loss_against,
)
from service.results.report.plotting import log_ticks
from service.results.schemas import (
    Costs,
    Evaluation,
    Growth,
    ReportTrial,
    StudyResults,
    TargetRun,
)
from service.results.verdict import Verdict, judge_runs
from service.specs.study import StudySpec
from service.studies.schemas import RunCounts

# Where the page does not escape it, this ends a script, starts another and loads an image.
EVIL = "</script><script>alert('x')</script><img src=//evil.example/a.png>"
SPEC = StudySpec.model_validate(
    {
        "name": "a-study",
        "data": {"source": "stdlib"},
        "proxy": {"width": 32, "depth": 1, "head_dim": 16},
        "target": {"width": 64},
        "search_space": {"lr": {"type": "float", "low": 1e-4, "high": 1e-1, "log": True}},
        "hpo": {"trials": 2},
    }
)
COSTS = Costs(
    search_flops=8e9,
    base_flops=1e9,
    warm_flops=4e9,
    warm_base_counted_flops=5e9,
    cold_flops=4e9,
    total_flops=24e9,
)
GROWTH = Growth(g_width=2, g_nonembedding=4, g_total=2.5)


def page(*arguments):
    return b"".join(report.render_report(*arguments)).decode()


# Losses fall by a quarter per evaluation and end at `final`, at 250, 500, 750 and 1000 tokens.
def curve(final):
    return tuple(
        Evaluation(step=i, tokens=250 * i, val_loss_nats=final + 1 - i / 4) for i in range(1, 5)
    )


def trial(number=0, **changes):
    fields = {
        "number": number,
        "run_id": f"run_{number}",
        "state": "succeeded",
        "diverged": False,
        "params": {"lr": 0.01},
        "val_loss_nats": 2.0,
        "cost_flops": 1e9,
        "error": None,
        "curve": curve(2.0),
    }
    return ReportTrial.model_validate(fields | changes)


def target(arm, seed, final, **changes):
    fields = {
        "run_id": f"run_{arm}_{seed}",
        "arm": arm,
        "seed": seed,
        "seed_number": seed,
        "state": "succeeded",
        "val_loss_nats": final,
        "tokens": 1000,
        "num_tokens": 1000,
        "cost_flops": 4e9,
        "curve": curve(final),
    }
    return TargetRun.model_validate(fields | changes)


def results(targets=(), **changes):
    fields = {
        "study_id": "st_1",
        "study_name": "a-study",
        "state": "active",
        "reason": None,
        "trials_budget": 2,
        "trials": RunCounts(),
        "best_trial": None,
        "targets": targets,
        "costs": COSTS,
        "verdict": None,
        "pending": "0 of 2 trials are finished",
    }
    return StudyResults.model_validate(fields | changes)


@pytest.fixture
def judged():
    targets = [target(a, s, f) for s in (0, 1) for a, f in (("warm", 1.9), ("cold", 2.0))]
    verdict = judge_runs(targets, growth=GROWTH, costs=COSTS)
    assert isinstance(verdict, Verdict)
    return results(targets, state="completed", verdict=verdict, pending=None)


class Page(HTMLParser):
    """The page as a browser parses it: the attributes of its elements, and its text."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.texts = [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)


def read_figures(html):
    embedded = re.search(
        r'<script id="figures" type="application/json">(.*?)</script>', html, re.DOTALL
    )
    assert embedded
    return json.loads(embedded[1])


def test_the_page_needs_no_network(judged):
    html = page(judged, [trial()], SPEC)
    elements = Page(html).elements
    assert not [tag for tag, _ in elements if tag in ("link", "iframe", "img", "object", "base")]
    assert not [attrs for tag, attrs in elements if tag == "script" and "src" in attrs]
    policy = [a["content"] for t, a in elements if t == "meta" and "http-equiv" in a]
    assert policy[0].startswith("default-src 'none'")


def test_every_figure_has_its_place_and_every_place_its_figure(judged):
    html = page(judged, [trial(0), trial(1, params={"lr": 0.02})], SPEC)
    places = {a["id"] for _, a in Page(html).elements if a.get("class") == "plot"}
    assert places == set(read_figures(html))
    assert places == {"arms", "differences", "trials", "learning", "dimension-lr"}


def test_nothing_a_user_wrote_becomes_markup(judged):
    choices = {"lr": {"type": "categorical", "choices": [0.01]}}
    spec = StudySpec.model_validate(SPEC.model_dump() | {"search_space": choices})
    evil = page(
        judged.model_copy(update={"study_name": EVIL, "reason": EVIL}),
        [trial(params={"lr": EVIL}, error=EVIL)],
        spec,
    )
    tags = [tag for tag, _ in Page(evil).elements]
    # The page's own three: the figures' JSON, Plotly, and the script that draws.
    assert (tags.count("script"), tags.count("img")) == (3, 0)
    assert any(EVIL in text for text in Page(evil).texts)


# Ways to leave a text, an attribute or a script in HTML.
MARKS = "<script>alert(1)</script> </script><script>x \"><b onload='x'> '-x-' <!-- <img src=x>"


class Scripts(HTMLParser):
    """The text of every script element, as a browser parses it."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.found, self.inside = [], False
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.inside = tag == "script"
        if self.inside:
            self.found.append((dict(attrs), ""))

    def handle_endtag(self, tag):
        self.inside = self.inside and tag != "script"

    def handle_data(self, data):
        if self.inside:
            attributes, text = self.found[-1]
            self.found[-1] = (attributes, text + data)


def test_the_page_runs_its_own_scripts_by_their_hashes_and_allows_no_other(judged):
    html = page(judged, [trial()], SPEC)
    (policy,) = [a["content"] for t, a in Page(html).elements if t == "meta" and "http-equiv" in a]
    (allowed,) = [part.split()[1:] for part in policy.split("; ") if part.startswith("script-src")]
    # The JSON of the figures has a type that browsers do not run, so it needs no hash.
    run = [text for attributes, text in Scripts(html).found if "type" not in attributes]
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in run]
    assert len(run) == 2
    assert allowed == [f"'sha256-{digest}'" for digest in digests]


@pytest.mark.parametrize("place", ["name", "reason", "pending", "error", "value", "arm", "best"])
def test_a_mark_in_any_text_of_a_user_changes_no_element_of_the_page(judged, place, monkeypatch):
    # Without Plotly's 5 MB: both pages are parsed in Python, seven times.
    monkeypatch.setattr(document, "_read_plotly", lambda: iter([b""]))
    monkeypatch.setattr(document, "_hash_scripts", lambda: "")
    choices = {"lr": {"type": "categorical", "choices": [0.01]}}
    spec = StudySpec.model_validate(SPEC.model_dump() | {"search_space": choices})

    def render_with(text):
        best = {
            "number": 0,
            "run_id": text,
            "val_loss_nats": 2.0,
            "params": {"lr": text},
            "checkpoint": SimpleNamespace(uri=text, hash="0" * 64),
        }
        changes = {
            "name": ({"study_name": text}, {}),
            "reason": ({"reason": text}, {}),
            "pending": ({"verdict": None, "pending": text}, {}),
            "error": ({}, {"error": text}),
            "value": ({}, {"params": {"lr": text}}),
            "arm": ({"targets": [judged.targets[0].model_copy(update={"error": text})]}, {}),
            "best": ({"best_trial": SimpleNamespace(**best)}, {}),
        }
        of_results, of_trial = changes[place]
        return page(judged.model_copy(update=of_results), [trial(**of_trial)], spec)

    plain, marked = render_with("plain"), render_with(MARKS)
    # If any mark became markup, the marked page would have other elements than the plain page.
    assert Page(marked).elements == Page(plain).elements
    assert len(Scripts(marked).found) == 3
    read_figures(marked)  # the JSON is complete: no mark ended the script element


def test_hover_texts_hold_no_markup_of_a_user():
    figure = draw_loss_against(
        [trial(params={"lr": "<a href='http://evil.example'>x</a>"})], "lr", log=False
    )
    assert "<a" not in json.dumps(figure)


def test_the_verdict_s_sentence_is_on_the_page(judged):
    text = " ".join(Page(page(judged, [], SPEC)).texts)
    # The page shows the headline apart and begins the rest with a capital: compare after "over ".
    assert "Growing paid" in text
    assert judged.verdict.sentence.split(": ", 1)[1][5:] in text


def test_a_study_with_nothing_yet_says_what_it_waits_for():
    html = page(results(), [], SPEC)
    text = " ".join(Page(html).texts)
    assert "No verdict yet" in text
    assert "0 of 2 trials are finished" in text
    assert read_figures(html) == {}


def test_averages_have_curves_and_columns_where_a_run_keeps_them(judged):
    assert "EMA loss" not in Page(page(judged, [], SPEC)).texts
    averaged = [
        Evaluation(step=1, tokens=100, val_loss_nats=2.5, ema_val_loss_nats=2.4),
        Evaluation(step=2, tokens=200, val_loss_nats=2.0, ema_val_loss_nats=1.8765),
    ]
    html = page(results([target("warm", 0, 2.0, curve=averaged)]), [], SPEC)
    assert {"EMA loss", "1.8765"} <= set(Page(html).texts)
    assert "SWA loss" not in Page(html).texts
    raw, ema = read_figures(html)["arms"]["data"]
    assert (raw["y"], ema["y"]) == ([2.5, 2.0], [2.4, 1.8765])
    assert ema["name"] == "warm, seed 0, EMA"


def test_curves_start_after_the_first_token():
    runs = [
        target("warm", 0, 1.9, curve=(Evaluation(step=0, tokens=0, val_loss_nats=9), *curve(2)))
    ]
    (trace,) = read_figures(page(results(runs), [], SPEC))["arms"]["data"]
    assert min(trace["x"]) > 0


def test_a_page_of_many_trials_stays_a_page():
    trials = [trial(n, curve=(), val_loss_nats=2 + n / 1000) for n in range(2 * MAX_TABLE_TRIALS)]
    html = page(results(), trials, SPEC)
    # The header is a row too.
    assert html.count("<tr>") == MAX_TABLE_TRIALS + 1
    assert f"The best {MAX_TABLE_TRIALS} of {2 * MAX_TABLE_TRIALS} trials" in html


def test_ticks_of_a_logarithmic_axis_reach_past_both_ends():
    ticks = log_ticks(0.0005, 0.03)
    assert ticks[0] <= 0.0005
    assert ticks[-1] >= 0.03
    assert ticks == sorted(ticks)


def test_the_base_counted_is_the_base_and_one_warm_run():
    targets = [
        target("warm", 0, 1.9),
        target("warm", 1, 1.9, cost_flops=6e9),
        target("cold", 0, 2.0),
    ]
    costs = compute_costs(search_flops=9e9, best_flops=1e9, targets=targets, total_flops=23e9)
    # Warm is the mean of 4e9 and 6e9; the best trial's 1e9 is the base.
    assert costs.warm_flops == 5e9
    assert costs.warm_base_counted_flops == 6e9
    assert costs.cold_flops == 4e9


def test_a_ladder_s_lower_rungs_are_part_of_its_base():
    lower = [target("warm", s, 2.0, cost_flops=2e9) for s in (0, 1)]
    last = [target("warm", s, 1.9, rung=1) for s in (0, 1)]
    costs = compute_costs(
        search_flops=9e9, best_flops=1e9, targets=[*lower, *last], total_flops=21e9
    )
    # The best trial's 1e9, and the 2e9 of one lower run: each seed has a lower run of its own.
    assert costs.base_flops == 3e9


def test_runs_that_failed_are_no_measure_of_cost():
    targets = [target("warm", 0, 2.0, state="failed", cost_flops=1.0)]
    costs = compute_costs(search_flops=9e9, best_flops=None, targets=targets, total_flops=9e9)
    assert costs.warm_flops is None
    assert costs.warm_base_counted_flops is None


EXTREME = st.sampled_from([None, 0.0, 1e-300, 5e-324, 2.0, 1e300, 1.7e308, -1.7e308]) | st.floats(
    allow_nan=False, allow_infinity=False
)
curves = st.lists(EXTREME.filter(lambda loss: loss is not None), max_size=4).map(
    lambda losses: tuple(
        Evaluation(step=i, tokens=i * 250, val_loss_nats=loss, ema_val_loss_nats=loss)
        for i, loss in enumerate(losses)
    )
)


@st.composite
def finished(draw):
    """Draw the trials and targets of a study: each ended in any way, with any loss."""
    ends = ["succeeded", "pruned", "failed", "cancelled"]
    changes = {"val_loss_nats": EXTREME, "curve": curves, "state": st.sampled_from(ends)}
    lr = st.fixed_dictionaries({"lr": st.sampled_from([5e-324, 1e-3, 1.7e308])})
    trials = [
        trial(n, diverged=diverged, **draw(st.fixed_dictionaries(changes | {"params": lr})))
        for n, diverged in enumerate(draw(st.lists(st.booleans(), max_size=5)))
    ]
    targets = [
        target(arm, seed, 2.0, **draw(st.fixed_dictionaries(changes)))
        for seed in range(draw(st.integers(0, 3)))
        for arm in ("warm", "cold")
    ]
    return trials, targets


@given(finished())
@settings(max_examples=60)
def test_any_finished_study_has_results_and_a_report_in_finite_numbers(study):
    trials, targets = study
    judged = judge_runs(targets, growth=GROWTH, costs=COSTS)
    found = {"verdict": judged} if isinstance(judged, Verdict) else {"pending": judged.why}
    whole = results(targets).model_copy(update=found)
    json.dumps(whole.model_dump(mode="json"), allow_nan=False)
    # The first piece ends with the figures, before Plotly's 5 MB.
    head = b"".join(itertools.islice(report.render_report(whole, trials, SPEC), 1)).decode()
    assert "nan" not in head.split("</script>")[0].split("application/json")[-1].lower()


def test_of_very_many_trials_the_best_are_drawn_and_the_record_is_whole():
    # Odd trials improve one by one to 1001 at number 3999: 2000 records. Even ones never do.
    trials = [trial(n, curve=(), val_loss_nats=5000.0 - n if n % 2 else 9e3) for n in range(4001)]
    figures = read_figures(page(results(), trials, SPEC))
    *points, record = figures["trials"]["data"]
    shown = [number for trace in points for number in trace["x"]]
    assert MAX_TABLE_TRIALS < len(shown) <= MAX_DRAWN_TRIALS
    assert 3999 in shown
    assert (record["y"][-1], len(record["y"])) == (1001.0, 2002)
