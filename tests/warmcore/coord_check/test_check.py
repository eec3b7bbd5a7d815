"""The coordinate check itself; tests of the parametrizations apply it to our models."""

import json
import logging

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from warmcore.__main__ import main
from warmcore.coord_check import cli
from warmcore.coord_check.check import CheckSetup, check_axis, resize_model
from warmcore.specs import ModelSpec, TrainSpec
from warmcore.specs.coord_check import KINDS, AxisCheck, CoordCheck, fit_slope

exponents = st.floats(-3, 3)


@given(exponents, st.floats(1e-3, 1e3))
def test_a_power_law_has_its_exponent_as_slope(exponent, factor):
    sizes = (64, 128, 512)
    means = [factor * size**exponent for size in sizes]
    assert fit_slope(sizes, means) == pytest.approx(exponent, abs=1e-9)


def test_what_is_all_zero_has_no_slope():
    assert fit_slope((1, 2), (0.0, 0.0)) is None


@given(st.dictionaries(st.sampled_from(KINDS), exponents, min_size=1))
def test_a_kind_is_flat_within_the_tolerance_and_only_there(planted):
    sizes = (64, 256)
    means = {kind: [[1.0, 1.0], [n**e for n in sizes]] for kind, e in planted.items()}
    axis = AxisCheck.from_means("width", sizes, means)
    beyond = {kind for kind, exponent in planted.items() if abs(exponent) > 0.1}
    assert set(axis.find_steep_kinds(0.1)) == beyond
    assert all(by_step[0] == 0 for by_step in axis.slopes.values())


def test_a_lone_models_own_width_and_depth_stay_its_base():
    model = ModelSpec(width=32, depth=2, head_dim=16)
    assert resize_model(model, "width", 128).width_multiplier == 4
    assert resize_model(model, "depth", 8).depth_multiplier == 4
    based = model.model_copy(update={"base_width": 16})
    assert resize_model(based, "width", 128).width_multiplier == 8


def test_step_0_precedes_training_and_each_step_is_measured(corpus):
    def check(num_steps):
        train = TrainSpec(batch_size=2, lr=0.01)
        setup = CheckSetup(
            tokens=corpus.train, train=train, context=8, num_steps=num_steps, num_seeds=2
        )
        model = ModelSpec(width=16, depth=1, head_dim=8)
        return check_axis(setup, model, "depth", (1, 2))

    long, short = check(3), check(1)
    for kind in KINDS:
        assert len(long.means[kind]) == 4
        assert long.means[kind][:2] == short.means[kind]
        assert long.means[kind][1] != long.means[kind][2]
    # The unembedding starts at 0, and with it the logits.
    assert long.means["unembedding"][0] == (0, 0)


@pytest.fixture
def run_yaml(data_spec, tmp_path):
    path = tmp_path / "run.yaml"
    spec = {
        "model": {"width": 16, "depth": 1, "head_dim": 8},
        "data": data_spec.model_dump(),
        "train": {"batch_size": 4},
    }
    path.write_text(yaml.safe_dump(spec))
    return path


def checked(run_yaml, *options):
    small = ["--steps", "1", "--seeds", "1", "--context", "8", "--batch-size", "2"]
    sizes = ["--widths", "16,32", "--depths", "1,2"]
    out = run_yaml.parent / "out"
    return main(["coord-check", str(run_yaml), "--out", str(out), *small, *sizes, *options])


@pytest.mark.parametrize(
    ("tolerance", "code", "word"), [("100", 0, "pass"), ("1e-12", 1, "FAIL")], ids=["wide", "none"]
)
def test_the_exit_code_says_whether_all_slopes_are_within_the_tolerance(
    tolerance, code, word, run_yaml, capsys
):
    assert checked(run_yaml, "--tolerance", tolerance) == code
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:-1]] == list(KINDS)
    assert all(line.split()[2] == word for line in lines[1:-1])


def test_the_file_has_the_slopes_and_what_they_are_of(run_yaml, capsys):
    code = checked(run_yaml, "--optimizer", "muon", "--parametrization", "standard", "--json")
    content = (run_yaml.parent / "out" / cli.FILE).read_text()
    assert json.loads(capsys.readouterr().out) == json.loads(content)
    found = CoordCheck.model_validate_json(content)
    assert (found.train.optimizer, found.model.parametrization) == ("muon", "standard")
    assert [(axis.axis, axis.sizes) for axis in found.axes] == [
        ("width", (16, 32)),
        ("depth", (1, 2)),
    ]
    assert code == (0 if found.is_flat else 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--widths", "16,20"], "width 20 is not a multiple of 8"),
        (["--widths", "none", "--depths", "none"], "both none"),
        (["--lr", "-1"], "greater than 0"),
    ],
)
def test_a_size_that_cannot_be_is_said_with_its_number(options, message, run_yaml, caplog):
    with caplog.at_level(logging.ERROR):
        assert checked(run_yaml, *options) == 2
    assert message in caplog.text


def test_one_size_has_no_slope(run_yaml, capsys):
    with pytest.raises(SystemExit) as ended:
        checked(run_yaml, "--widths", "64")
    assert ended.value.code == 2
    assert "64 is a single size; a slope needs two" in capsys.readouterr().err
