from pathlib import Path

import fsspec
import pytest

from warmcore.checkpoint.checkpoint import MANIFEST, CheckpointCorruptError, load_checkpoint
from warmcore.corpus.prepare import prepare_corpus
from warmcore.specs import CheckpointRef
from warmcore.storage import locations
from warmcore.training.training import Training
from workers.attempt import checkpoints


@pytest.fixture(params=["file", "memory"])
def uri(request, tmp_path: Path) -> str:
    """A URI on disk, and a URI in an object store."""
    if request.param == "file":
        return (tmp_path / "a b" / "step-00000000").as_uri()
    return f"memory://{tmp_path.name}/step-00000000"


@pytest.fixture
def training(make_spec) -> Training:
    spec = make_spec()
    return Training.start(spec, prepare_corpus(spec.data))


def test_what_is_saved_is_what_is_loaded(training: Training, uri: str) -> None:
    saved = checkpoints.save_training(training, uri)
    with checkpoints.open_local(CheckpointRef(uri=uri, hash=saved.hash)) as path:
        weights = load_checkpoint(path, expected_hash=saved.hash).weights
    assert weights.keys() == training.model.state_dict().keys()
    assert all(weights[name].equal(value) for name, value in training.model.state_dict().items())


def test_a_checkpoint_that_is_not_there_is_corrupt(uri: str) -> None:
    ref = CheckpointRef(uri=uri, hash="0" * 64)
    with pytest.raises(CheckpointCorruptError), checkpoints.open_local(ref):
        pass


def test_another_checkpoint_in_its_place_is_refused(training: Training, uri: str) -> None:
    saved = checkpoints.save_training(training, uri)
    files, root = locations.find_filesystem(uri)
    manifest = files.cat_file(f"{root}/{MANIFEST}")
    files.pipe_file(f"{root}/{MANIFEST}", manifest + b" ")
    ref = CheckpointRef(uri=uri, hash=saved.hash)
    with pytest.raises(CheckpointCorruptError, match=saved.hash), checkpoints.open_local(ref):
        pass


def test_the_manifest_is_uploaded_last(training: Training, tmp_path: Path) -> None:
    checkpoints.save_training(training, f"memory://{tmp_path.name}/c")
    files = fsspec.filesystem("memory")
    created_at = {Path(f["name"]).name: f["created"] for f in files.ls(f"/{tmp_path.name}/c")}
    assert max(created_at, key=created_at.__getitem__) == MANIFEST
    assert len(created_at) == 3


def test_deleting_removes_all_of_it_and_what_is_gone_may_be_deleted(
    training: Training, uri: str
) -> None:
    run = uri.rpartition("/")[0]
    uri = f"{run}/attempt-001/step-00000000"
    saved = checkpoints.save_training(training, uri)
    files, root = locations.find_filesystem(uri)
    assert files.exists(root)
    checkpoints.delete_checkpoint(uri, of_run=run)
    assert not files.exists(root)
    checkpoints.delete_checkpoint(uri, of_run=run)
    with (
        pytest.raises(CheckpointCorruptError),
        checkpoints.open_local(CheckpointRef(uri=uri, hash=saved.hash)),
    ):
        pass


@pytest.mark.parametrize(
    "other",
    ["", "/", "/attempt-001", "/attempt-001/..", "/attempt-001/../../x", "/attempt-001/%2e%2e",
     "/attempt-001//x", "/attempt-001/link", "2/attempt-001/step", "/else/step"],
)  # fmt: skip
def test_nothing_but_a_checkpoint_of_the_run_is_deleted(tmp_path: Path, other: str) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    for folder in (run / "attempt-001" / "step", tmp_path / "run2" / "attempt-001", elsewhere):
        folder.mkdir(parents=True)
        (folder / MANIFEST).touch()
    (run / "attempt-001" / "link").symlink_to(elsewhere)
    # The checkpoint, the run with a longer name, and the folder behind the link must all survive.
    with pytest.raises(ValueError, match="it is not deleted"):
        checkpoints.delete_checkpoint(f"{run.as_uri()}{other}", of_run=run.as_uri())
    assert len(list(tmp_path.rglob(MANIFEST))) == 3
    checkpoints.delete_checkpoint(f"{run.as_uri()}/attempt-001/step", of_run=run.as_uri())
    assert len(list(tmp_path.rglob(MANIFEST))) == 2


def test_a_local_checkpoint_is_used_in_place(training: Training, tmp_path: Path) -> None:
    uri = (tmp_path / "here").as_uri()
    saved = checkpoints.save_training(training, uri)
    with checkpoints.open_local(CheckpointRef(uri=uri, hash=saved.hash)) as path:
        assert path == tmp_path / "here"
    assert path.is_dir()


def test_a_copy_lasts_as_long_as_its_context(training: Training, tmp_path: Path) -> None:
    uri = f"memory://{tmp_path.name}/copy"
    saved = checkpoints.save_training(training, uri)
    with checkpoints.open_local(CheckpointRef(uri=uri, hash=saved.hash)) as path:
        assert path.is_dir()
    assert not path.exists()


def test_what_a_crash_left_half_deleted_is_deleted_by_the_next(training: Training, uri: str):
    checkpoints.save_training(training, uri)
    files, root = locations.find_filesystem(uri)
    files.rm(f"{root}/{MANIFEST}")
    locations.delete_checkpoint(uri)
    assert not files.exists(root)
