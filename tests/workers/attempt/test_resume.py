"""The checkpoint from which an attempt goes on, on disk and in an object store, after damage."""

from pathlib import Path

import pytest

from warmcore.checkpoint.checkpoint import MANIFEST, load_checkpoint
from warmcore.corpus.prepare import prepare_corpus
from warmcore.specs import CheckpointRef
from warmcore.storage import locations
from warmcore.storage.backoff import every
from warmcore.training.training import Training
from workers.attempt import checkpoints, resume

WEIGHTS = "model.safetensors"


@pytest.fixture(params=["file", "memory"])
def stored(request, tmp_path: Path, make_spec):
    """Two checkpoints, the newer first, on disk and in an object store."""
    root = (tmp_path / "run").as_uri() if request.param == "file" else f"memory://{tmp_path.name}"
    spec = make_spec()
    training = Training.start(spec, prepare_corpus(spec.data))
    refs = []
    for name in ("older", "newer"):
        saved = checkpoints.save_training(training, f"{root}/{name}")
        refs.insert(0, CheckpointRef(uri=f"{root}/{name}", hash=saved.hash))
    return refs


def resume_from(refs, *, patience_seconds=0.0, before_wait=lambda: None, read=None):
    read = read or (lambda folder: folder.name and load_checkpoint(folder))
    used = []

    def read_and_note(folder):
        checkpoint = read(folder)
        used.append(folder)
        return checkpoint

    checkpoint = resume.read_newest(
        refs, read_and_note, before_wait=before_wait, patience_seconds=patience_seconds
    )
    return checkpoint, used


def flip(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


DAMAGES = {
    "a bit flipped": flip,
    "cut short": lambda data: data[: len(data) // 2],
    "emptied": lambda _: b"",
    "gone": None,
}


@pytest.mark.parametrize("name", [WEIGHTS, MANIFEST])
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_has_the_one_before_in_its_place(stored, name, damage):
    files, root = locations.find_filesystem(stored[0].uri)
    if damage is None:
        files.rm(f"{root}/{name}")
    else:
        files.pipe_file(f"{root}/{name}", damage(files.cat_file(f"{root}/{name}")))
    tried = []

    def read(folder):
        tried.append(folder)
        return load_checkpoint(folder)

    checkpoint, used = resume_from(stored, read=read)
    assert checkpoint is not None
    assert len(used) == 1
    with checkpoints.open_local(stored[1]) as older:
        same = load_checkpoint(older).weights
    assert all(checkpoint.weights[key].equal(value) for key, value in same.items())
    locations.delete_checkpoint(stored[1].uri)
    assert resume_from(stored)[0] is None


def test_the_newest_is_taken_where_nothing_is_wrong(stored):
    locations.delete_checkpoint(stored[1].uri)
    assert resume_from(stored)[0] is not None


class Away:
    """A store that cannot be reached for the first `times` reads."""

    def __init__(self, times):
        self.times, self.waits = times, 0

    def read(self, folder):
        if self.times:
            self.times -= 1
            raise ConnectionResetError("the store is away")
        return load_checkpoint(folder)

    def wait(self):
        self.waits += 1


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch):
    monkeypatch.setattr(resume, "_BACKOFF", every(0.01))


def test_a_store_that_is_away_is_waited_for_and_costs_no_step(stored):
    store = Away(3)
    checkpoint, _ = resume_from(
        stored, read=store.read, before_wait=store.wait, patience_seconds=60
    )
    assert checkpoint is not None
    assert store.waits == 3


def test_a_store_that_stays_away_ends_the_attempt_and_is_no_reason_to_start_again(stored):
    with pytest.raises(ConnectionResetError):
        resume_from(stored, read=Away(1000).read)


def test_a_checkpoint_on_a_bad_disk_has_the_one_before_in_its_place(stored):
    checkpoint, _ = resume_from(stored, read=Away(1).read)
    assert checkpoint is not None


def test_who_waits_for_a_store_can_be_told_to_stop(stored):
    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        resume_from(stored, read=Away(1000).read, before_wait=stop, patience_seconds=60)
