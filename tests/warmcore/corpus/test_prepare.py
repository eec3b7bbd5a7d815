"""A corpus is tokenized once, by concurrent preparers and killed preparers alike."""

import os
import subprocess
import sys

import numpy as np
import pytest

from warmcore.corpus import prepare as data_module
from warmcore.corpus import tokenize_documents
from warmcore.corpus.documents import split_corpus
from warmcore.corpus.prepare import prepare_corpus
from warmcore.corpus.sources import list_files
from warmcore.specs import DataSpec


def test_tokens_are_the_documents_bytes_each_ended_by_zero(data_spec, cache):
    corpus = prepare_corpus(data_spec, cache)
    split = split_corpus(list_files(data_spec.source), data_spec)
    for tokens, documents in ((corpus.train, split.train), (corpus.val, split.val)):
        assert bytes(tokens.astype(np.uint8)) == b"".join(d.read_bytes() + b"\0" for d in documents)
    assert corpus.data_hash == split.data_hash
    assert min(corpus.num_train_tokens, corpus.num_val_tokens) > data_spec.context


def test_an_unchanged_listing_is_not_read_again(data_spec, cache, monkeypatch):
    before = prepare_corpus(data_spec, cache)
    # Reading the files again would call None.
    monkeypatch.setattr(data_module, "split_corpus", None)
    assert prepare_corpus(data_spec, cache) is before


def test_a_touched_file_is_read_again_and_its_content_found(tmp_path, cache):
    path = tmp_path / "a.txt"
    path.write_bytes(os.urandom(4000))
    spec = DataSpec(source=str(path), context=16)
    before = prepare_corpus(spec, cache)
    # Another time, the same content: the listing changes, the corpus does not.
    os.utime(path, ns=(1, 1))
    assert prepare_corpus(spec, cache) is before
    path.write_bytes(os.urandom(4000))
    assert prepare_corpus(spec, cache).data_hash != before.data_hash


def test_a_preparer_killed_half_way_leaves_nothing_that_is_taken_for_a_corpus(
    data_spec, tmp_path, monkeypatch
):
    def interrupt(path, documents):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tokenize_documents, "_write_tokens", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare_corpus(data_spec, tmp_path)
    # `kill -9` leaves a folder like this.
    (tmp_path / f".{'0' * 64}-left").mkdir()
    assert prepare_corpus(data_spec, tmp_path).num_train_tokens > 10_000


PREPARE = """
import sys
from pathlib import Path
from warmcore.corpus.prepare import prepare_corpus
from warmcore.corpus.sources import list_files
from warmcore.specs import DataSpec
sys.stdin.readline()
spec = DataSpec(source=sys.argv[1], context=16, tokenizer=sys.argv[3])
corpus = prepare_corpus(spec, Path(sys.argv[2]))
print(corpus.data_hash, int(corpus.train.sum()))
"""


@pytest.mark.parametrize("tokenizer", ["byte", "bpe:300"])
def test_concurrent_preparers_agree(data_spec, tmp_path, tokenizer):
    command = [sys.executable, "-c", PREPARE, data_spec.source, str(tmp_path), tokenizer]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **pipes) for _ in range(3)]
    # Each process has imported the modules and waits for a line: all prepare at the same time.
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    answers = {process.communicate(timeout=60)[0] for process in processes}
    assert [process.returncode for process in processes] == [0, 0, 0]
    corpus = prepare_corpus(data_spec.model_copy(update={"tokenizer": tokenizer}), tmp_path)
    assert answers == {f"{corpus.data_hash} {int(corpus.train.sum())}\n"}
    assert not list(tmp_path.glob(".*"))


def test_losing_the_race_to_publish_is_no_error(data_spec, tmp_path, monkeypatch):
    first = prepare_corpus(data_spec, tmp_path)
    split = split_corpus(list_files(data_spec.source), data_spec)
    real = tokenize_documents._write_tokens

    # Another preparer: its folder appears while ours is being written.
    folder = tmp_path / first.data_hash
    folder.rename(tmp_path / "other")

    def publish_first(path, documents):
        real(path, documents)
        if not folder.exists():
            (tmp_path / "other").rename(folder)

    monkeypatch.setattr(tokenize_documents, "_write_tokens", publish_first)
    tokenize_documents.write_split(split, data_spec, tmp_path)
    assert sorted(p.name for p in folder.iterdir()) == ["train.u16", "val.u16"]
