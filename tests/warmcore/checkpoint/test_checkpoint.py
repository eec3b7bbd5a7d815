"""Checkpoints: equal states give equal hashes, and damage is refused."""

import hashlib
import json
import shutil

import pytest

from warmcore.checkpoint.checkpoint import (
    MANIFEST,
    MODEL,
    OPTIMIZER,
    CheckpointCorruptError,
    checkpoint_path,
    list_checkpoints,
    load_checkpoint,
)
from warmcore.storage import atomic_writes
from warmcore.training.training import Training


@pytest.fixture
def training(run_spec, corpus):
    training = Training.start(run_spec(), corpus)
    events = training.train_to_end()
    while training.step < 5:
        next(events)
    return training


@pytest.fixture
def saved(training, tmp_path):
    return training.save(tmp_path / "checkpoint")


def test_the_manifest_says_all_that_there_is(training, saved):
    loaded = load_checkpoint(saved.path, expected_hash=saved.hash)
    manifest = loaded.manifest
    assert manifest.run == training.spec
    assert manifest.data_hash == training.corpus.data_hash
    assert manifest.progress == training.progress
    assert (manifest.tokens, saved.step) == (training.tokens, 5)
    assert set(manifest.versions) == {"torch", "numpy", "safetensors"}
    assert saved.val_loss_nats == training.last_val_loss_nats
    assert saved.num_bytes == sum(file.stat().st_size for file in saved.path.iterdir())
    assert {file.name for file in saved.path.iterdir()} == {MANIFEST, MODEL, OPTIMIZER}


def test_the_hash_is_the_manifests_and_equal_states_have_equal_hashes(training, saved, tmp_path):
    content = (saved.path / MANIFEST).read_bytes()
    assert saved.hash == hashlib.sha256(content).hexdigest()
    assert training.save(tmp_path / "again").hash == saved.hash
    next(training.train_to_end())
    assert training.save(tmp_path / "later").hash != saved.hash


@pytest.mark.parametrize("file", [MODEL, OPTIMIZER, MANIFEST])
def test_one_flipped_bit_is_refused(saved, file):
    path = saved.path / file
    content = bytearray(path.read_bytes())
    # The middle of a file of tensors is in the tensors, behind the header.
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    found = hashlib.sha256(content).hexdigest()
    with pytest.raises(CheckpointCorruptError, match=f"{path} is corrupt.*found {found}"):
        load_checkpoint(saved.path, expected_hash=saved.hash)


@pytest.mark.parametrize("file", [MODEL, OPTIMIZER, MANIFEST])
def test_a_missing_file_is_named(saved, file):
    (saved.path / file).unlink()
    with pytest.raises(CheckpointCorruptError, match=f"{file} is corrupt.*[Nn]o"):
        load_checkpoint(saved.path)


def test_a_truncated_manifest_is_refused_without_a_hash_to_compare(saved):
    path = saved.path / MANIFEST
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointCorruptError, match="expected a manifest of format 1"):
        load_checkpoint(saved.path)


def test_another_checkpoint_than_the_expected_one_is_refused(saved):
    with pytest.raises(CheckpointCorruptError, match=f"expected {'0' * 64}, found {saved.hash}"):
        load_checkpoint(saved.path, expected_hash="0" * 64)


def test_an_unknown_format_is_refused(saved):
    path = saved.path / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 2}))
    with pytest.raises(CheckpointCorruptError, match="format 1"):
        load_checkpoint(saved.path)


def test_saving_half_way_leaves_no_checkpoint(training, tmp_path, monkeypatch):
    directory = tmp_path / "checkpoints"

    def raise_interrupt(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        # The files are written by then, and the folder is not yet renamed.
        patch.setattr(atomic_writes, "_sync", raise_interrupt)
        with pytest.raises(KeyboardInterrupt):
            training.save(checkpoint_path(directory, 5))
    assert list(directory.iterdir()) == []
    training.save(checkpoint_path(directory, 5))
    assert list_checkpoints(directory) == [checkpoint_path(directory, 5)]


def test_saving_over_a_damaged_checkpoint_repairs_it(training, saved):
    (saved.path / MODEL).write_bytes(b"")
    again = training.save(saved.path)
    assert again == saved
    load_checkpoint(saved.path)
    assert list(saved.path.parent.iterdir()) == [saved.path]


def test_a_checkpoint_may_be_moved(saved, tmp_path):
    shutil.copytree(saved.path, tmp_path / "elsewhere")
    assert load_checkpoint(tmp_path / "elsewhere").hash == saved.hash


def test_checkpoints_are_listed_newest_first(training, tmp_path):
    paths = [checkpoint_path(tmp_path, step) for step in (9, 10, 100)]
    for path in paths:
        training.save(path)
    assert list_checkpoints(tmp_path) == paths[::-1]
