"""JSONL, Parquet, Arrow and `hf:` data sets give the same documents, a document for each record."""

import gzip
import json
import tempfile
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from warmcore.corpus import hub, records, sources
from warmcore.corpus.documents import split_corpus
from warmcore.corpus.facts import inspect_documents
from warmcore.corpus.prepare import prepare_corpus
from warmcore.corpus.sources import list_files
from warmcore.specs import DataSpec

CONTEXT = 8


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"id": 1, "text": text}) + "\n" for text in texts))


def write_gz(path, texts):
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)


def write_parquet(path, texts):
    # Several row groups: the reader must join them.
    table = pa.table({"other": range(len(texts)), "text": texts})
    pq.write_table(table, path, row_group_size=7)


def write_arrow(path, texts):
    batch = pa.record_batch({"text": pa.array(texts, pa.string())})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)


def write_arrow_file(path, texts):
    batch = pa.record_batch({"text": pa.array(texts, pa.large_string())})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)


def write_files(path, texts):
    path.mkdir()
    for number, text in enumerate(texts):
        (path / f"{number}.txt").write_bytes(text.encode())


FORMATS = {
    "a.jsonl": write_jsonl,
    "a.jsonl.gz": write_gz,
    "a.parquet": write_parquet,
    "a.arrow": write_arrow,
    "b.arrow": write_arrow_file,
    "texts": write_files,
}
DOCUMENTS = [f"document {n} has {n * n} words, \u00e9t\u00e9 \U0001f642\n" for n in range(60)]


def make_split(source, folder, **fields):
    spec = DataSpec(source=str(source), context=CONTEXT, **fields)
    return split_corpus(list_files(spec.source), spec, folder / "scratch")


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_split_of_text_files(tmp_path, name):
    for each in {name, "texts"}:
        FORMATS[each](tmp_path / each, DOCUMENTS)
    found, expected = (make_split(tmp_path / each, tmp_path) for each in (name, "texts"))
    assert found.data_hash == expected.data_hash
    assert [d.read_bytes() for d in found.train] == [d.read_bytes() for d in expected.train]


texts = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=40), max_size=12)


@given(texts, st.sampled_from(sorted(set(FORMATS) - {"texts"})), st.floats(0.05, 0.5))
def test_no_validation_document_is_in_training_and_none_is_lost(
    tmp_path_factory, drawn, name, fraction
):
    folder = tmp_path_factory.mktemp("records")
    documents = [*DOCUMENTS, *drawn, *drawn, *DOCUMENTS[:9]]
    FORMATS[name](folder / name, documents)
    split = make_split(folder / name, folder, val_fraction=fraction)
    train, val = ({d.read_bytes() for d in side} for side in (split.train, split.val))
    assert not train & val
    whole = {text.encode() for text in documents} - {b""}
    cut = {document for document in train | val if document not in whole}
    # A document that is not there as a whole was cut; its first piece must be there.
    for text in whole - train - val:
        assert any(text.startswith(piece) for piece in cut)
    assert len(split.train) + len(split.val) == len(train | val)


def test_prepared_records_are_their_texts(tmp_path):
    write_parquet(tmp_path / "a.parquet", DOCUMENTS)
    spec = DataSpec(source=str(tmp_path / "a.parquet"), context=CONTEXT)
    corpus = prepare_corpus(spec, tmp_path / "cache")
    tokens = bytes([*corpus.train.tolist(), *corpus.val.tolist()])
    assert sorted(tokens.split(b"\0")[:-1]) == sorted(text.encode() for text in DOCUMENTS)
    assert not list((tmp_path / "cache").glob(".*"))


def test_null_is_no_document_and_neither_is_a_blank_line(tmp_path):
    lines = [json.dumps({"text": text}) for text in (None, *DOCUMENTS)]
    (tmp_path / "a.jsonl").write_text("\n\n".join(lines))
    write_parquet(tmp_path / "a.parquet", [None, *DOCUMENTS])
    for name in ("a.jsonl", "a.parquet"):
        split = make_split(tmp_path / name, tmp_path)
        assert len(split.train) + len(split.val) == len(DOCUMENTS)


def test_memory_does_not_grow_with_the_file(tmp_path):
    """An 8 MB file is unpacked with less than 1 MB of Python's memory."""
    text = "x" * 2000
    write_jsonl(tmp_path / "a.jsonl", [f"{number} {text}" for number in range(4000)])
    (file,) = list_files(str(tmp_path / "a.jsonl"))
    tracemalloc.start()
    total = sum(
        len(content) for _, content in records.unpack_records([file], "text", tmp_path / "s")
    )
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert total > 8_000_000
    assert peak < 1_000_000


def read_refusal(path, **fields):
    spec = DataSpec(source=str(path), context=CONTEXT, **fields)
    with pytest.raises(ValueError) as caught:
        inspect_documents(spec, list_files(spec.source))
    return str(caught.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"body": "x", "id": 3}', "a.jsonl:2: no 'text' in this record; its keys are: body, id"),
        ('{"text": 3}', "a.jsonl:2: 'text' is 3 in this record"),
        ("{", "a.jsonl:2 is no JSON"),
        ("[1]", 'a.jsonl:2 is no object; a line like {"text": "…"} works'),
        ('{"text": "\\ud800"}', "a.jsonl: record 2 holds half a character"),
        ("[" * 100_000, "a.jsonl:2 is no JSON"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n' + line + "\n")
    assert message in read_refusal(tmp_path / "a.jsonl")


def test_another_field_is_named_by_text_field(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(f'{{"body": "{n} words"}}\n' for n in range(99)))
    assert make_split(tmp_path / "a.jsonl", tmp_path, text_field="body").train
    write_parquet(tmp_path / "a.parquet", DOCUMENTS)
    message = read_refusal(tmp_path / "a.parquet", text_field="body")
    assert "no column 'body'; text_field can name: other, text" in message
    assert "holds int64, not strings" in read_refusal(tmp_path / "a.parquet", text_field="other")


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.jsonl.gz"])
def test_a_file_that_is_not_what_its_name_says_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"not this format, though long enough for a footer")
    assert name in read_refusal(tmp_path / name)


def test_a_folder_that_save_to_disk_wrote_is_read_in_its_own_format(tmp_path):
    for folder in ("saved", "dict/train"):
        (tmp_path / folder).mkdir(parents=True)
        write_arrow(tmp_path / folder / "data-0.arrow", DOCUMENTS)
        state = json.dumps({"_data_files": [{"filename": "data-0.arrow"}]})
        (tmp_path / folder / "state.json").write_text(state)
    (tmp_path / "dict" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    for folder in ("saved", "dict"):
        split = make_split(f"hf:{tmp_path / folder}", tmp_path)
        assert len(split.train) + len(split.val) == len(DOCUMENTS)
    with pytest.raises(ValueError, match=r"was not written by save_to_disk.*without hf:"):
        list_files(f"hf:{tmp_path}")


def test_a_cached_data_set_is_found_by_name_and_no_other_is_looked_for(tmp_path, monkeypatch):
    """The cache has the layout that `load_dataset` writes; the look-up must not use a network."""
    folder = tmp_path / "acme___tiny" / "default" / "0.0.0" / ("a" * 40)
    folder.mkdir(parents=True)
    write_arrow(folder / "tiny-train.arrow", DOCUMENTS)
    info = {
        "config_name": "default",
        "dataset_name": "tiny",
        "builder_name": "parquet",
        "features": {"text": {"dtype": "string", "_type": "Value"}},
        "splits": {"train": {"name": "train", "num_examples": 60, "dataset_name": "tiny"}},
        "version": {"version_str": "0.0.0", "major": 0, "minor": 0, "patch": 0},
    }
    (folder / "dataset_info.json").write_text(json.dumps(info))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    # The look-up is cached by name, and another test may have used this name with another cache.
    hub._look_up.cache_clear()
    split = make_split("hf:acme/tiny", tmp_path)
    assert len(split.train) + len(split.val) == len(DOCUMENTS)
    with pytest.raises(ValueError, match=r"hf:acme/tiny:other is not in .*load_dataset\('acme"):
        list_files("hf:acme/tiny:other")


@pytest.mark.parametrize("name", ["hf:", "hf:a b", "hf:a/b/c", "hf:--help x", "hf:a;b", "hf:a/..",
                                  "hf:a/.", "hf:a:..", "hf:a/..:b"])  # fmt: skip
def test_what_is_no_name_is_refused_before_anything_runs(name, monkeypatch):
    monkeypatch.setattr(hub, "run_module", None)
    with pytest.raises(ValueError, match="hf:NAME"):
        list_files(name)


def test_a_name_never_means_a_folder_of_this_machine(tmp_path, monkeypatch):
    """`datasets` prefers an existing folder to a name, and would read any file in that folder."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    hub._look_up.cache_clear()
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        Path(folder, "secret.jsonl").write_text('{"text": "secret"}\n')
        with pytest.raises(ValueError, match="not in this machine's cache"):
            list_files(f"hf:{folder.removeprefix('/')}")


def test_a_pattern_goes_down_any_number_of_folders_once(tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "x.txt").write_text("text")
    assert [file.path.name for file in list_files(f"{tmp_path}/**/*.txt")] == ["x.txt"]
    # The second pattern must be refused before a walk begins.
    monkeypatch.setattr(sources, "find_matches", None)
    source = f"{tmp_path}/**/**/*.txt"
    with pytest.raises(ValueError, match=r"has 2 \*\*, and 1 would work"):
        list_files(source)
