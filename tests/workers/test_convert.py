"""The process that `warmscale export` and `warmscale import` start."""

import json

import pytest
import yaml

from service.studies.schemas import TargetRequest
from warmcore.checkpoint.checkpoint import MODEL, checkpoint_path, load_checkpoint
from warmcore.corpus.prepare import prepare_corpus
from warmcore.specs import CheckpointRef, GrowthSpec, ModelSpec
from warmcore.training.training import Training
from workers.attempt import checkpoints
from workers.convert import DAMAGED, DONE, REFUSED, main


@pytest.fixture
def training(make_spec):
    spec = make_spec()
    return Training.start(spec, prepare_corpus(spec.data))


@pytest.fixture
def saved(training, tmp_path):
    return training.save(checkpoint_path(tmp_path / "run" / "checkpoints", 7))


@pytest.fixture
def exported(saved, tmp_path):
    assert main(["export", str(saved.path), "--out", str(tmp_path / "hf")]) == DONE
    return tmp_path / "hf"


def read_output(capsys):
    return json.loads(capsys.readouterr().out)


def test_of_a_local_run_the_newest_checkpoint_is_exported(training, saved, tmp_path, capsys):
    newest = training.save(checkpoint_path(saved.path.parent, 8))
    out = tmp_path / "hf"
    assert main(["--json", "export", str(tmp_path / "run"), "--out", str(out)]) == DONE
    done = read_output(capsys)
    assert done["checkpoint"] == {"uri": newest.path.as_uri(), "hash": newest.hash}
    assert done["path"] == str(out)
    assert set(done["files"]) == {path.name for path in out.iterdir()}
    assert done["num_bytes"] == sum(path.stat().st_size for path in out.iterdir())


def test_dtype_and_size_of_files_are_as_asked_for(saved, tmp_path):
    asked = ["--dtype", "bfloat16", "--max-shard-bytes", "1000"]
    assert main(["export", str(saved.path), "--out", str(tmp_path / "hf"), *asked]) == DONE
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "bfloat16"
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 2


def test_a_checkpoint_in_an_object_store_is_exported_by_its_hash(training, tmp_path, capsys):
    uri = f"memory://{tmp_path.name}/checkpoint"
    stored = checkpoints.save_training(training, uri)
    out = ["--out", str(tmp_path / "hf")]
    assert main(["export", uri, *out]) == REFUSED
    assert "give the hash of the checkpoint" in capsys.readouterr().err
    assert main(["export", uri, "--hash", "0" * 64, *out]) == DAMAGED
    assert main(["export", uri, "--hash", stored.hash, *out]) == DONE


@pytest.mark.parametrize("place", ["file", "memory"])
def test_what_is_printed_is_what_a_spec_takes(place, exported, make_spec, tmp_path, capsys):
    out = str(tmp_path / "base") if place == "file" else f"memory://{tmp_path.name}/base"
    capsys.readouterr()
    assert main(["import", str(exported), "--out", out]) == DONE
    fields = yaml.safe_load(capsys.readouterr().out)
    growth = GrowthSpec.model_validate(fields["growth"] | {"operator": "clone"})
    model = ModelSpec.model_validate(fields["model"] | {"width": 32})
    run = make_spec().model_copy(update={"growth": growth, "model": model})
    with checkpoints.open_local(growth.base) as base:
        training = Training.start(run, prepare_corpus(run.data), base=base)
    assert training.base_hash == growth.base.hash


def test_json_holds_the_same(exported, tmp_path, capsys):
    capsys.readouterr()
    assert main(["--json", "import", str(exported), "--out", str(tmp_path / "base")]) == DONE
    done = read_output(capsys)
    ref = CheckpointRef(uri=done["uri"], hash=done["hash"])
    with checkpoints.open_local(ref) as base:
        manifest = load_checkpoint(base, expected_hash=ref.hash).manifest
    assert ModelSpec.model_validate(done["model"]) == manifest.model
    assert TargetRequest.model_validate({"base": done, "target": {"width": 32}}).base is not None


def test_what_is_refused_is_said_on_one_line(exported, tmp_path, capsys):
    (exported / "model.safetensors").unlink()
    assert main(["import", str(exported), "--out", str(tmp_path / "base")]) == REFUSED
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert "has no model.safetensors" in error
    assert not (tmp_path / "base").exists()


def test_a_damaged_checkpoint_is_said_to_be_damaged(saved, tmp_path, capsys):
    (saved.path / MODEL).write_bytes(b"")
    assert main(["export", str(saved.path), "--out", str(tmp_path / "hf")]) == DAMAGED
    assert "is corrupt" in capsys.readouterr().err


def test_a_folder_that_holds_none_is_said_to_hold_none(tmp_path, capsys):
    assert main(["export", str(tmp_path), "--out", str(tmp_path / "hf")]) == DAMAGED
    assert "checkpoint.json is corrupt" in capsys.readouterr().err
