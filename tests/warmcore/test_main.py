"""`python -m warmcore` from a user's command line, also killed and resumed."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from warmcore.__main__ import main
from warmcore.checkpoint.checkpoint import MODEL, list_checkpoints, load_checkpoint
from warmcore.run_file import read_spec
from warmcore.specs import RunSpec

NUM_STEPS = 150


@pytest.fixture(autouse=True)
def own_cache_and_signals(cache, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def fields(text_folder):
    return {
        "model": {"width": 16, "depth": 1, "head_dim": 8},
        "data": {"source": str(text_folder), "context": 16},
        "train": {
            "batch_size": 4,
            "num_tokens": NUM_STEPS * 64,
            "log_every": 1,
            "evaluations": 4,
            "eval_tokens": 256,
        },
    }


@pytest.fixture
def write(tmp_path):
    def write(fields, name="run.yaml"):
        path = tmp_path / name
        path.write_text(yaml.safe_dump(fields))
        return path

    return write


def run(spec, out, *options):
    return main([str(spec), "--out", str(out), "--threads", "1", *options])


def start(spec, out, *options):
    """Begin the same run in a process of its own, with a checkpoint after every event."""
    command = [sys.executable, "-m", "warmcore", str(spec), "--out", str(out)]
    command += ["--threads", "1", "--checkpoint-seconds", "0"]
    return subprocess.Popen([*command, *options], stderr=subprocess.DEVNULL)


def measurements(out):
    """Return the curve without its durations."""
    lines = (out / "measurements.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def wait_for_lines(out, process, num_lines):
    path = out / "measurements.jsonl"
    deadline = time.monotonic() + 60
    while not path.exists() or path.read_bytes().count(b"\n") < num_lines:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture
def uninterrupted(write, fields, tmp_path):
    assert run(write(fields), tmp_path / "whole") == 0
    return measurements(tmp_path / "whole")


def test_a_run_killed_twice_measures_what_an_uninterrupted_one_does(
    write, fields, tmp_path, uninterrupted
):
    spec, out = write(fields), tmp_path / "killed"
    for num_lines in (20, 45):
        process = start(spec, out)
        wait_for_lines(out, process, num_lines)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert num_lines - 2 <= len(measurements_of_whole_lines(out)) < len(uninterrupted)
    assert run(spec, out) == 0
    assert measurements(out) == uninterrupted
    assert len(uninterrupted) == NUM_STEPS + 5
    ends = [list_checkpoints(tmp_path / name / "checkpoints")[0] for name in ("whole", "killed")]
    assert load_checkpoint(ends[0]).hash == load_checkpoint(ends[1]).hash


def measurements_of_whole_lines(out):
    text = (out / "measurements.jsonl").read_text()
    return text[: text.rfind("\n") + 1].splitlines()


def test_a_terminated_run_saves_and_goes_on(write, fields, tmp_path, uninterrupted):
    spec, out = write(fields), tmp_path / "terminated"
    process = start(spec, out)
    wait_for_lines(out, process, 10)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 130
    # A run that was stopped has measured a part of the curve, and its checkpoint less or the same.
    stopped_at = len(measurements(out))
    assert 10 <= stopped_at < len(uninterrupted)
    newest = list_checkpoints(out / "checkpoints")[0]
    assert load_checkpoint(newest).manifest.progress.step <= stopped_at
    assert run(spec, out) == 0
    assert measurements(out) == uninterrupted


def test_one_process_goes_on_where_two_were_terminated(write, fields, tmp_path, uninterrupted):
    spec, out = write(fields), tmp_path / "two"
    process = start(spec, out, "--processes", "2", "--strategy", "fsdp")
    wait_for_lines(out, process, 10)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 130
    assert 10 <= len(measurements(out)) < len(uninterrupted)
    assert run(spec, out) == 0
    assert losses(measurements(out)) == pytest.approx(losses(uninterrupted), rel=1e-4)  # 150 steps


def losses(lines):
    return [line.get("loss_nats", line.get("val_loss_nats")) for line in lines]


def damage(checkpoint):
    path = checkpoint / MODEL
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_is_used(
    write, fields, tmp_path, uninterrupted, caplog
):
    out = tmp_path / "damaged"
    assert run(write(fields), out, "--checkpoint-seconds", "0") == 0
    newest, before = list_checkpoints(out / "checkpoints")
    damage(newest)
    # The measurements after the older checkpoint must be cut, or they would be there twice.
    with caplog.at_level(logging.INFO):
        assert run(write(fields), out) == 0
    assert f"skipped {newest / MODEL} is corrupt" in caplog.text
    assert f"resumed from {before}" in caplog.text
    assert measurements(out) == uninterrupted


def test_lost_measurements_are_made_again(write, fields, tmp_path, uninterrupted):
    out = tmp_path / "lost"
    assert run(write(fields), out) == 0
    (out / "measurements.jsonl").unlink()
    assert run(write(fields), out) == 0
    assert measurements(out) == uninterrupted


def test_a_finished_run_is_left_as_it_is(write, fields, tmp_path):
    out = tmp_path / "out"
    assert run(write(fields), out) == 0
    # Bytes, not values: a second run must not even write the file again in another form.
    before = (out / "measurements.jsonl").read_bytes()
    assert run(write(fields), out) == 0
    assert (out / "measurements.jsonl").read_bytes() == before


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_base_may_be_just_a_path(write, fields, tmp_path, scheme):
    assert run(write(fields), tmp_path / "base") == 0
    checkpoint = list_checkpoints(tmp_path / "base" / "checkpoints")[0]
    fields["model"] |= {"width": 32, "base_width": 16}
    fields["growth"] = {"operator": "clone", "base": f"{scheme}{checkpoint}"}
    assert run(write(fields, "wide.yaml"), tmp_path / "wide") == 0
    base, wide = (measurements(tmp_path / name) for name in ("base", "wide"))
    assert wide[0]["val_loss_nats"] == pytest.approx(base[-1]["val_loss_nats"], rel=1e-5)
    newest = list_checkpoints(tmp_path / "wide" / "checkpoints")[0]
    assert load_checkpoint(newest).manifest.base_hash == load_checkpoint(checkpoint).hash


def test_a_diverged_run_exits_with_3_and_says_why_in_its_curve(write, fields, tmp_path):
    fields["train"] |= {"lr": 10.0, "grad_clip": None}
    # The second run resumes before the divergence and diverges again, in a curve without repeats.
    for _ in range(2):
        assert run(write(fields), tmp_path / "out") == 3
        curve = measurements(tmp_path / "out")
        assert "for 20 steps in a row" in curve[-1]["reason"]
        assert sum("reason" in line for line in curve) == 1


def test_a_trunk_is_followed_by_its_branches_and_they_are_whole_runs(write, fields, tmp_path):
    """Also if a branch was stopped half-way; finished runs are not done again."""
    fields["train"] |= {"num_tokens": None, "cooldown_fraction": 0.4, "warmup_steps": 2}
    spec = write(fields | {"branches": [0.05, 0.1]})
    out = tmp_path / "out"
    assert run(spec, out, "--checkpoint-seconds", "0") == 0
    fields["train"] |= {"tokens_per_param": 0.05}
    assert run(write(fields, "whole.yaml"), tmp_path / "whole") == 0
    start = int(list_checkpoints(out / "checkpoints")[-1].name.removeprefix("step-"))
    later = [point for point in measurements(tmp_path / "whole") if point["step"] > start]
    assert measurements(out / "tpp-0.05") == later != []
    expected = [measurements(out / name) for name in ("tpp-0.05", "tpp-0.1")]
    written = {path: path.stat().st_mtime_ns for path in out.glob("checkpoints/*")}
    # Without its last checkpoint, a branch is a run that was stopped half-way.
    shutil.rmtree(list_checkpoints(out / "tpp-0.05" / "checkpoints")[0])
    assert run(spec, out) == 0
    assert [measurements(out / name) for name in ("tpp-0.05", "tpp-0.1")] == expected
    assert {path: path.stat().st_mtime_ns for path in out.glob("checkpoints/*")} == written


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": {"lr": -1}}, "train.lr = -1: Input should be greater than 0"),
        ({"model": {"widht": 3}}, "model.widht is not a field; width, depth, head_dim, "),
        ({"train": {"tempo": 3}}, "train.tempo is not a field; batch_size, tokens_per_param, "),
        ({"model": {"width": 20}}, "width 20 is not a multiple of 8"),
        ({"sede": 3}, "sede is not a field; model, data, train, growth, seed, trunk, branches are"),
        ({"data": {"source": "/no/such"}}, "source /no/such does not exist"),
        ({"growth": {"base": "/no/such"}}, "/no/such/checkpoint.json is corrupt"),
        ({"growth": {"base": "s3://b/c"}}, "growth.base.uri s3://b/c is not local"),
        ({"growth": {"base": "/no", "shrnk": 1}}, "/no/checkpoint.json is corrupt"),
        ({"model": None}, "model = None: Input should be"),
    ],
)
def test_a_bad_spec_exits_with_2_naming_field_value_and_what_works(
    write, fields, tmp_path, caplog, change, message
):
    for section, values in change.items():
        merge = isinstance(values, dict) and section in fields
        fields[section] = fields[section] | values if merge else values
    assert run(write(fields), tmp_path / "out") == 2
    assert message in caplog.text
    assert "Traceback" not in caplog.text


def test_a_missing_section_or_file_exits_with_2(write, fields, tmp_path, caplog):
    assert run(write({"data": fields["data"]}), tmp_path / "out") == 2
    assert "model is required" in caplog.text
    assert run(tmp_path / "no.yaml", tmp_path / "out") == 2
    assert "no.yaml cannot be read" in caplog.text


def test_another_specs_folder_is_refused(write, fields, tmp_path, caplog):
    assert run(write(fields), tmp_path / "out") == 0
    assert run(write(fields | {"seed": 1}), tmp_path / "out") == 2
    assert "is of another run: seed is 0, not 1" in caplog.text


def test_the_example_is_a_run():
    example = Path(__file__).parents[2] / "examples" / "run.yaml"
    assert isinstance(read_spec(example), RunSpec)
