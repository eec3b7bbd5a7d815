"""Tokenizers: text comes back, training is reproducible, and specs and checkpoints carry them."""

import hashlib
import json
import random
import subprocess
import sys
from string import ascii_lowercase

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from warmcore.checkpoint.checkpoint import read_manifest
from warmcore.corpus.documents import split_corpus
from warmcore.corpus.inspection import inspect_corpus
from warmcore.corpus.prepare import make_tokenizer_json, prepare_corpus
from warmcore.corpus.sources import list_files
from warmcore.corpus.tokenizer import END_OF_TEXT, TextTokenizer, make_byte_json, train_bpe
from warmcore.huggingface.export import export_hf
from warmcore.huggingface.importer import import_hf
from warmcore.specs import DataSpec, ModelSpec, RunSpec
from warmcore.training.training import Training


@pytest.fixture(scope="module")
def bpe(text_folder):
    texts = [path.read_text() for path in sorted(text_folder.iterdir())]
    return TextTokenizer.from_json(train_bpe(texts, 400), "bpe:400")


@pytest.fixture(scope="session")
def bpe_spec(data_spec):
    return data_spec.model_copy(update={"tokenizer": "bpe:400"})


def make_file_spec(spec, path, **fields):
    return DataSpec.model_validate(spec.model_dump() | {"tokenizer": str(path)} | fields)


# Half of a surrogate pair is no text: UTF-8 has no bytes for it.
any_text = st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(
    [
        END_OF_TEXT,
        f"a{END_OF_TEXT}b",
        "\0",
        "\r\n \t  x",
        "\N{ZERO WIDTH JOINER}e\u0301",
        "  \u3000",
    ]
)


@given(any_text)
def test_any_text_comes_back_from_bpe(bpe, text):
    (ids,) = bpe.encode([text])
    assert bpe.library.decode(ids[:-1], skip_special_tokens=False) == text


@given(any_text)
def test_only_the_end_of_a_document_is_an_end_of_text(bpe, text):
    (ids,) = bpe.encode([text])
    assert [place for place, token in enumerate(ids) if token == bpe.end_of_text] == [len(ids) - 1]


@given(any_text)
def test_the_exported_byte_tokenizer_is_the_bytes(text):
    byte = TextTokenizer.from_json(make_byte_json(), "byte")
    assert next(byte.encode([text])) == list(text.encode())
    assert byte.vocab_size == 256


TRAIN = """
import hashlib, sys
from pathlib import Path
from warmcore.corpus.tokenizer import train_bpe
texts = [path.read_text() for path in sorted(Path(sys.argv[1]).iterdir())]
texts = texts[::-1] if sys.argv[2] == "reversed" else texts
print(hashlib.sha256(train_bpe(texts, 400)).hexdigest())
"""


def test_the_same_text_trains_the_same_tokenizer_in_any_process_and_order(bpe, text_folder):
    answers = {
        subprocess.run(
            [sys.executable, "-c", TRAIN, str(text_folder), order],
            env=environment | {"PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for order, environment in (("sorted", {"RAYON_NUM_THREADS": "1"}), ("reversed", {}))
    }
    assert answers == {hashlib.sha256(bpe.json).hexdigest()}


def test_bpe_is_trained_on_the_training_side_alone(tmp_path):
    """Each document repeats a word of its own; only words of training become tokens."""
    draw = random.Random(0)  # noqa: S311 - text, not secrets
    for number in range(40):
        word = "".join(draw.choices(ascii_lowercase, k=12))
        (tmp_path / str(number)).write_text(f" {word}" * 30)
    spec = DataSpec(source=str(tmp_path), context=16, tokenizer="bpe:2000", val_fraction=0.3)
    split = split_corpus(list_files(spec.source), spec)
    tokens = set(json.loads(make_tokenizer_json(spec, tmp_path / "cache"))["model"]["vocab"])
    for documents, learned in ((split.train, True), (split.val, False)):
        assert {f"\u0120{d.read_text().split()[0]}" in tokens for d in documents} == {learned}


def test_tokens_are_the_documents_encoded_each_ended(bpe_spec, cache):
    corpus = prepare_corpus(bpe_spec, cache)
    split = split_corpus(list_files(bpe_spec.source), bpe_spec)
    loaded = TextTokenizer.from_json(make_tokenizer_json(bpe_spec, cache), "bpe:400")
    for tokens, documents in ((corpus.train, split.train), (corpus.val, split.val)):
        text = loaded.library.decode(tokens.tolist(), skip_special_tokens=False)
        assert text == "".join(d.read_text() + END_OF_TEXT for d in documents)
    assert (corpus.vocab_size, tokens.dtype) == (400, np.uint16)


def test_a_tokenizer_file_gives_the_tokens_of_the_bpe_it_came_from(bpe_spec, cache, tmp_path):
    trained = prepare_corpus(bpe_spec, cache)
    path = tmp_path / "tokenizer.json"
    path.write_bytes(make_tokenizer_json(bpe_spec, cache))
    spec = make_file_spec(bpe_spec, path)
    corpus = prepare_corpus(spec, cache)
    assert corpus.tokenizer == trained.tokenizer == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (np.array_equal(corpus.train, trained.train), corpus.vocab_size) == (True, 400)
    assert make_tokenizer_json(spec, cache) == path.read_bytes()


def test_ids_beyond_16_bits_are_stored_in_32(data_spec, cache, tmp_path):
    # A single token with id 70 000 needs 32 bits for all tokens.
    content = json.loads(make_byte_json())
    content["added_tokens"] = [
        {"id": 70_000, "content": END_OF_TEXT, "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    ]
    content["model"]["vocab"][END_OF_TEXT] = 70_000
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    corpus = prepare_corpus(make_file_spec(data_spec, path), cache)
    assert (corpus.vocab_size, corpus.train.dtype, int(corpus.train.max())) == (
        70_001,
        np.uint32,
        70_000,
    )


def test_every_tokenizer_has_a_data_hash_of_its_own(data_spec, bpe_spec, cache):
    specs = (data_spec, bpe_spec, bpe_spec.model_copy(update={"tokenizer": "bpe:401"}))
    assert len({prepare_corpus(spec, cache).data_hash for spec in specs}) == 3


def test_a_changed_tokenizer_file_is_refused_where_it_was_pinned(data_spec, bpe, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(bpe.json)
    spec = make_file_spec(data_spec, path)
    facts = inspect_corpus(spec)
    pinned = facts.pin_spec(spec)
    assert (pinned.vocab_size, pinned.tokenizer_hash) == (
        max(json.loads(bpe.json)["model"]["vocab"].values()) + 1,
        hashlib.sha256(bpe.json).hexdigest(),
    )
    assert prepare_corpus(pinned, tmp_path / "cache").data_hash == facts.data_hash
    # Another tokenizer at the same path.
    path.write_bytes(make_byte_json())
    with pytest.raises(ValueError, match=r"tokenizer.json has changed: its hash is \w{64}, not"):
        prepare_corpus(pinned, tmp_path / "cache")


def test_text_that_is_no_utf8_is_named_with_its_place(tmp_path):
    (tmp_path / "good.txt").write_text("good " * 400)
    (tmp_path / "latin.txt").write_bytes(b"good " * 400 + b"\xe9t\xe9")
    spec = DataSpec(source=str(tmp_path), tokenizer="bpe:300", context=16)
    with pytest.raises(ValueError, match=r"latin\.txt is no UTF-8 at byte 2000; .*tokenizer byte"):
        inspect_corpus(spec)
    byte = spec.model_copy(update={"tokenizer": "byte"})
    assert inspect_corpus(byte).data_hash


def test_pieces_never_end_within_a_character(tmp_path):
    draw = random.Random(0)  # noqa: S311 - text, not secrets
    path = tmp_path / "one-line.txt"
    path.write_text("".join(draw.choices("a\u00e9\u65e5\U0001f642", k=20_000)))
    # Characters of 1 to 4 bytes, and no line end to cut at.
    spec = DataSpec(source=str(path), tokenizer="bpe:300", context=16)
    split = split_corpus(list_files(spec.source), spec)
    pieces = sorted((*split.train, *split.val), key=lambda piece: piece.offset)
    assert len(pieces) > 20
    assert "".join(piece.read_text() for piece in pieces) == path.read_text()


@pytest.mark.parametrize(
    "name", ["gpt2", "bpe", "bpe:", "bpe:256", "bpe:1048577", "bpe:-1", "bpe:1e3", "bpe:²", ""]
)
def test_what_is_no_tokenizer_is_refused_with_what_is(name):
    with pytest.raises(ValidationError, match=r"bpe:\d+"):
        DataSpec(source="stdlib", tokenizer=name)


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff", b'{"model": {"type": "BPE"}}', b"[1]"])
def test_a_file_that_is_no_tokenizer_is_refused(data_spec, tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^tokenizer {path} is no tokenizer.json"):
        inspect_corpus(make_file_spec(data_spec, path))


def test_the_model_has_the_vocabulary_of_its_tokenizer(data_spec, bpe_spec):
    model = ModelSpec(width=16, depth=1, head_dim=8)
    assert RunSpec(model=model, data=data_spec).model.vocab_size == 256
    run = RunSpec(model=model, data=bpe_spec)
    assert run.model.vocab_size == run.with_params({"lr": 0.1}).model.vocab_size == 400
    assert RunSpec.model_validate_json(run.model_dump_json()) == run


def test_a_vocabulary_may_be_padded_and_not_cut(bpe_spec):
    padded = ModelSpec(width=16, depth=1, head_dim=8, vocab_size=512)
    assert RunSpec(model=padded, data=bpe_spec).model.vocab_size == 512
    # 256 ids would leave 144 ids of the tokenizer without an embedding.
    cut = ModelSpec(width=16, depth=1, head_dim=8, vocab_size=256)
    with pytest.raises(ValidationError, match=r"vocab_size 256 is smaller than the 400 .*bpe:400"):
        RunSpec(model=cut, data=bpe_spec)
    with pytest.raises(ValidationError, match="512 is not the 400 of tokenizer bpe:400"):
        DataSpec(source="stdlib", tokenizer="bpe:400", vocab_size=512)


def test_growth_keeps_the_tokenizer(bpe_spec, run_spec, cache, tmp_path):
    """Two tokenizers with the same number of ids differ in their hash alone."""
    corpus = prepare_corpus(bpe_spec, cache)
    base = RunSpec(**(run_spec(steps=1).model_dump() | {"data": bpe_spec, "model": MODEL}))
    saved = Training.start(base, corpus).save(tmp_path / "base")
    growth = {"base": {"uri": str(saved.path), "hash": saved.hash}}
    wide = {"model": MODEL | {"width": 32, "base_width": 16}, "growth": growth}
    grown = RunSpec.model_validate(base.model_dump() | wide)
    Training.start(grown, corpus, base=saved.path)

    (tmp_path / "text").mkdir()
    for number in range(40):
        (tmp_path / "text" / str(number)).write_text(f"other text {number}\n" * 30)
    other = bpe_spec.model_copy(update={"source": str(tmp_path / "text")})
    elsewhere = grown.with_data(other)
    found = prepare_corpus(other, tmp_path / "cache")
    with pytest.raises(ValueError, match=f"growth.base .*{corpus.tokenizer}.*{found.tokenizer}"):
        Training.start(elsewhere, found, base=saved.path)
    byte = RunSpec.model_validate(base.model_dump() | wide | {"data": run_spec().data})
    with pytest.raises(ValueError, match=f"growth.base .*{corpus.tokenizer}.* are of byte"):
        Training.start(byte, prepare_corpus(byte.data, cache), base=saved.path)

    path = tmp_path / "tokenizer.json"
    path.write_bytes(make_tokenizer_json(bpe_spec, cache))
    kept = make_file_spec(other, path)
    Training.start(grown.with_data(kept), prepare_corpus(kept, tmp_path / "cache"), base=saved.path)


def test_a_checkpoint_and_its_export_carry_the_tokenizer(bpe_spec, run_spec, cache, tmp_path):
    corpus = prepare_corpus(bpe_spec, cache)
    run = RunSpec(**(run_spec(steps=1).model_dump() | {"data": bpe_spec, "model": MODEL}))
    saved = Training.start(run, corpus).save(tmp_path / "ours")
    export_hf(saved.path, tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        content = (tmp_path / folder / "tokenizer.json").read_bytes()
        assert content == make_tokenizer_json(bpe_spec, cache)
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert (config["eos_token_id"], config["vocab_size"]) == (0, 400)
    again = import_hf(tmp_path / "theirs", tmp_path / "again")
    assert read_manifest(again.path)[0].tokenizer == corpus.tokenizer


MODEL = {"width": 16, "depth": 1, "head_dim": 8}
