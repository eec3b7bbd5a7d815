"""The split of a corpus depends on its content alone, and no document is on both sides."""

import os
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from warmcore.corpus import documents as documents_module
from warmcore.corpus import facts as facts_module
from warmcore.corpus.documents import split_corpus
from warmcore.corpus.inspection import inspect_corpus
from warmcore.corpus.sources import list_files
from warmcore.specs import DataSpec

CONTEXT = 16


def make_text(seed, num_bytes):
    """Lines of text that do not repeat."""
    draw = random.Random(seed)  # noqa: S311 - text, not secrets
    lines = b""
    while len(lines) < num_bytes:
        lines += bytes(draw.choices(b"abcdefgh ", k=draw.randint(5, 40))) + b"\n"
    return lines[:num_bytes]


def make_split(source, **fields):
    spec = DataSpec(source=str(source), context=CONTEXT, **fields)
    return split_corpus(list_files(spec.source), spec)


def read_contents(documents):
    return {document.read_bytes() for document in documents}


documents = st.lists(
    st.tuples(st.integers(0, 10**6), st.integers(40, 400)), min_size=4, max_size=40, unique=True
)


@given(documents, st.floats(0.02, 0.5))
def test_no_validation_document_is_in_training_even_as_a_copy(tmp_path_factory, sizes, fraction):
    folder = tmp_path_factory.mktemp("corpus")
    # Files 0, 3, 6, ... exist once; files 1, 4, 7, ... have a copy, and files 2, 5, 8, ... two.
    for number, (seed, num_bytes) in enumerate(sizes):
        for copy in range(1 + number % 3):
            (folder / f"{number}-{copy}.txt").write_bytes(make_text(seed, num_bytes))
    split = make_split(folder, val_fraction=fraction)
    train, val = read_contents(split.train), read_contents(split.val)
    assert not train & val
    assert len(train) == len(split.train)
    assert len(val) == len(split.val)
    whole = {make_text(seed, num_bytes) for seed, num_bytes in sizes}
    assert sum(map(len, train | val)) <= sum(map(len, whole))


@given(documents, st.randoms(use_true_random=False))
def test_the_split_depends_on_content_not_on_names_or_copies(tmp_path_factory, sizes, order):
    folders = [tmp_path_factory.mktemp("corpus") for _ in range(2)]
    shuffled = order.sample(sizes, len(sizes))
    for folder, listing in zip(folders, (sizes, shuffled), strict=True):
        for number, (seed, num_bytes) in enumerate(listing):
            (folder / f"{number}.txt").write_bytes(make_text(seed, num_bytes))
    (folders[1] / "copy").write_bytes(make_text(*sizes[0]))
    first, second = map(make_split, folders)
    assert first.data_hash == second.data_hash
    assert read_contents(first.val) == read_contents(second.val)


def test_one_changed_byte_changes_the_data_hash(tmp_path):
    (tmp_path / "a.txt").write_bytes(make_text(0, 5000))
    before = make_split(tmp_path).data_hash
    (tmp_path / "a.txt").write_bytes(make_text(0, 4999) + b"!")
    assert make_split(tmp_path).data_hash != before


def test_which_side_a_document_is_on_changes_the_data_hash(tmp_path):
    for seed in range(40):
        (tmp_path / str(seed)).write_bytes(make_text(seed, 200))
    assert make_split(tmp_path).data_hash != make_split(tmp_path, val_fraction=0.5).data_hash


@pytest.mark.parametrize("num_bytes", [1_000, 5_000, 200_000])
@pytest.mark.parametrize("line_end", [b"\n", b" "])
def test_a_single_file_is_cut_into_both_sides_and_nothing_is_lost(tmp_path, num_bytes, line_end):
    path = tmp_path / "book.txt"
    path.write_bytes(make_text(1, num_bytes).replace(b"\n", line_end))
    split = make_split(path)
    pieces = sorted((*split.train, *split.val), key=lambda piece: piece.offset)
    assert b"".join(piece.read_bytes() for piece in pieces) == path.read_bytes()
    share = sum(p.num_bytes for p in split.val) / num_bytes
    # A piece is extended by up to 256 bytes, to a line's end: far more than 5 % of a short file.
    assert share < 0.5 if num_bytes <= 5_000 else 0.05 <= share < 0.08
    if line_end == b"\n":
        assert all(piece.read_bytes().endswith(b"\n") for piece in pieces[:-1])


def test_a_large_document_among_small_ones_does_not_swallow_validation(tmp_path):
    (tmp_path / "large").write_bytes(make_text(0, 100_000))
    for seed in range(1, 30):
        (tmp_path / str(seed)).write_bytes(make_text(seed, 500))
    split = make_split(tmp_path)
    # 5 % of 114 500 bytes are 5 725. Validation ends with the document that reaches this number.
    assert sum(d.num_bytes for d in split.val) < 12_000


def test_small_documents_are_never_cut(tmp_path):
    for seed in range(30):
        (tmp_path / str(seed)).write_bytes(make_text(seed, 500))
    split = make_split(tmp_path)
    assert {d.num_bytes for d in (*split.train, *split.val)} == {500}


def test_folders_are_read_recursively_without_hidden_files(tmp_path):
    (tmp_path / "deep" / ".hidden").mkdir(parents=True)
    for name in ("a.txt", "deep/b.txt", ".c", "deep/.hidden/d", "empty"):
        (tmp_path / name).write_bytes(b"" if name == "empty" else make_text(1, 50))
    os.mkfifo(tmp_path / "pipe")
    names = [file.path.name for file in list_files(str(tmp_path))]
    assert names == ["a.txt", "b.txt"]


def test_globs_are_recursive(tmp_path):
    (tmp_path / "x" / "y").mkdir(parents=True)
    for name in ("a.txt", "x/b.txt", "x/y/c.txt", "x/y/d.md"):
        (tmp_path / name).write_bytes(make_text(1, 50))
    names = [file.path.name for file in list_files(f"{tmp_path}/**/*.txt")]
    assert names == ["a.txt", "b.txt", "c.txt"]


def test_the_standard_library_is_a_corpus_without_tests_or_installed_packages():
    files = list_files("stdlib")
    # Python 3.11 has some 12 MB of modules without the tests.
    assert sum(file.num_bytes for file in files) > 5_000_000
    parts = {part for file in files for part in file.path.parts[-6:-1]}
    assert not parts & {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    assert {file.path.suffix for file in files} == {".py"}


def test_facts_of_a_small_corpus_are_those_of_its_split(tmp_path):
    (tmp_path / "a").write_bytes(make_text(0, 4000))
    facts = inspect_corpus(DataSpec(source=str(tmp_path), context=CONTEXT))
    split = make_split(tmp_path)
    assert facts.num_bytes == 4000
    assert facts.num_documents == len(split.train) + len(split.val)
    # A separator follows each document.
    assert facts.num_train_tokens + facts.num_val_tokens == 4000 + facts.num_documents
    assert facts.data_hash == split.data_hash


def test_a_large_corpus_is_measured_but_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(facts_module, "MAX_INSPECTED_BYTES", 3999)
    monkeypatch.setattr(facts_module, "split_corpus", None)
    (tmp_path / "a").write_bytes(make_text(0, 4000))
    facts = inspect_corpus(DataSpec(source=str(tmp_path)))
    assert (facts.num_documents, facts.num_bytes, facts.data_hash) == (1, 4000, None)


def read_refusal(source, context=128):
    with pytest.raises(ValueError) as caught:
        inspect_corpus(DataSpec(source=str(source), context=context))
    return str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    assert read_refusal(tmp_path / "no.txt").startswith(f"source {tmp_path}/no.txt does not exist")


@pytest.mark.parametrize("source", ["~nosuchuser/x", "hf:~nosuchuser/x"])
def test_a_home_folder_of_nobody_is_named(source):
    with pytest.raises(ValueError, match=f"source {source} has no such home folder"):
        list_files(source)


def test_a_glob_without_matches_is_named(tmp_path):
    assert f"source {tmp_path}/*.txt matches no files" in read_refusal(tmp_path / "*.txt")


def test_an_empty_corpus_says_how_many_files_it_saw(tmp_path):
    assert read_refusal(tmp_path) == f"source {tmp_path} is empty: 0 files, 0 bytes"
    (tmp_path / "a").touch()
    assert read_refusal(tmp_path) == f"source {tmp_path} is empty: 1 files, 0 bytes"


def test_a_corpus_shorter_than_a_context_says_how_long_it_must_be(tmp_path):
    (tmp_path / "a").write_bytes(make_text(0, 99))
    message = read_refusal(tmp_path)
    # 99 bytes and a separator.
    assert message.startswith("corpus has 100 tokens")
    assert message.endswith("training and validation each need at least context + 1 = 129")


def test_a_corpus_of_one_repeated_piece_cannot_be_split(tmp_path):
    for number in range(50):
        (tmp_path / str(number)).write_bytes(make_text(0, 200))
    assert "0 of them for training" in read_refusal(tmp_path, context=400)


def test_an_unreadable_file_is_named(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_bytes(make_text(0, 4000))

    def refuse(self):
        raise PermissionError(13, "Permission denied", str(self))

    # The tests may run as root, and root may read a file of mode 000.
    monkeypatch.setattr(documents_module, "_hash_file", refuse)
    assert f"cannot be read: [Errno 13] Permission denied: '{path}'" in read_refusal(tmp_path)


def test_a_document_that_changes_after_hashing_is_refused(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(make_text(0, 4000))
    split = make_split(tmp_path)
    path.write_bytes(make_text(1, 4000))
    with pytest.raises(ValueError, match="changed while the corpus was prepared"):
        split.train[0].read_bytes()
