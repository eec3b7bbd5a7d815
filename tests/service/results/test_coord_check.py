"""The page of a coordinate check, and the command that makes it."""

import json
import re

import pytest
import yaml
from typer.testing import CliRunner

from service.cli.main import app
from service.results.report.coord_check import render_coord_check
from warmcore.specs import ModelSpec, TrainSpec
from warmcore.specs.coord_check import KINDS, AxisCheck, CoordCheck


# Means that grow as size ** exponent: a line of that slope on logarithmic axes. The first step is
# all 0 and has no line: 0 has no logarithm.
def check_with(exponent):
    sizes = (64, 128, 256)
    steps = [[0.0] * 3, [1.0] * 3, [n**exponent for n in sizes]]
    axes = [
        AxisCheck.from_means(axis, sizes, dict.fromkeys(KINDS, steps))
        for axis in ("width", "depth")
    ]
    return CoordCheck(
        model=ModelSpec(width=64, depth=2),
        train=TrainSpec(),
        context=32,
        num_steps=2,
        num_seeds=4,
        axes=axes,
    )


def text_of(check):
    return b"".join(render_coord_check(check)).decode()


def figures_of(text):
    found = re.search(r'<script id="figures" type="application/json">(.*?)</script>', text)
    return json.loads(found[1])


@pytest.mark.parametrize(("exponent", "headline"), [(0.01, "Flat"), (0.5, "Not flat")])
def test_the_page_says_whether_it_is_flat(exponent, headline):
    text = text_of(check_with(exponent))
    assert f"<strong>{headline}</strong>" in text
    assert ("attention in width (+0.500)" in text) == (headline == "Not flat")


def test_each_kind_has_a_figure_per_axis_and_a_line_per_step_that_is_not_zero():
    figures = figures_of(text_of(check_with(0.5)))
    assert set(figures) == {f"{axis}-{kind}" for axis in ("width", "depth") for kind in KINDS}
    for figure in figures.values():
        assert [line["name"] for line in figure["data"]] == ["step 1", "step 2"]
        low, high = figure["layout"]["yaxis"]["range"]
        assert high - low >= 1  # a decade at least: noise must not look steep


def test_the_command_draws_what_another_process_measured_and_ends_as_it_did(corpus, tmp_path):
    spec = {
        "model": {"width": 16, "depth": 1, "head_dim": 8},
        "data": {"source": str(corpus), "context": 16},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(spec))
    small = ["--steps", "1", "--seeds", "1", "--widths", "16,32", "--depths", "none"]
    out = tmp_path / "out"
    arguments = ["coord-check", str(tmp_path / "run.yaml"), "--out", str(out), *small]
    result = CliRunner().invoke(app, [*arguments, "--tolerance", "1e-12"])
    assert result.exit_code == 1
    measured = CoordCheck.model_validate_json((out / "slopes.json").read_text())
    assert (out / "coord-check.html").read_text() == text_of(measured)


def test_a_bad_spec_ends_the_command_and_draws_nothing(tmp_path):
    out = tmp_path / "out"
    arguments = ["coord-check", str(tmp_path / "none.yaml"), "--out", str(out)]
    assert CliRunner().invoke(app, arguments).exit_code == 2
    assert not out.exists()
