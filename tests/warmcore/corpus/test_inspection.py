"""A field that only the inspecting process can refuse is named as if this process had."""

import json
import subprocess

import numpy as np
import pytest

from warmcore.corpus import inspection
from warmcore.corpus.inspection import BAD_SPEC, inspect_corpus, inspect_here
from warmcore.corpus.tokenizer import make_byte_json
from warmcore.specs import DataSpec, FieldError

TEXT = "some words of a text\n" * 400


def write_text(folder):
    (folder / "a.txt").write_text(TEXT)
    return {"tokenizer": "none", "vocab_size": 300}


def write_tokens(folder):
    np.save(folder / "a.npy", np.arange(4000, dtype=np.uint16) % 300)
    return {"tokenizer": "byte"}


def write_large_id(folder):
    np.save(folder / "a.npy", np.arange(4000, dtype=np.uint16) % 300)
    return {"tokenizer": "none", "vocab_size": 299}


def write_id_beyond_a_tokenizer(folder):
    write_large_id(folder)
    (folder / ".tokenizer.json").write_bytes(make_byte_json())  # 256 ids
    return {"tokenizer": str(folder / ".tokenizer.json")}


def write_bin(folder):
    (folder / "a.bin").write_bytes(bytes(4000))
    return {"tokenizer": "none", "vocab_size": 300}


def write_records(folder):
    (folder / "a.jsonl").write_text('{"body": "x"}\n')
    return {"text_field": "text"}


# Hidden files are no part of a corpus, and the tokenizer may be beside the text.
def write_bad_tokenizer(folder):
    (folder / "a.txt").write_text(TEXT)
    (folder / ".tokenizer.json").write_text("{}")
    return {"tokenizer": str(folder / ".tokenizer.json")}


def write_other_tokenizer(folder):
    return write_bad_tokenizer(folder) | {"tokenizer_hash": "0" * 64}


@pytest.mark.parametrize(
    ("write", "path"),
    [
        (write_text, "tokenizer"),
        (write_tokens, "tokenizer"),
        (write_large_id, "vocab_size"),
        (write_id_beyond_a_tokenizer, "vocab_size"),
        (write_bin, "token_dtype"),
        (write_records, "text_field"),
        (write_bad_tokenizer, "tokenizer"),
        (write_other_tokenizer, "tokenizer_hash"),
    ],
)
def test_a_bad_field_crosses_the_process_with_its_value_and_message(tmp_path, write, path):
    spec = DataSpec(source=str(tmp_path), context=16, **write(tmp_path))
    with pytest.raises(FieldError) as here:
        inspect_here(spec)
    with pytest.raises(FieldError) as there:
        inspect_corpus(spec)
    # The field's value is the user's, not a value that the inspection computed.
    for refused in (here.value, there.value):
        assert (refused.path, refused.value) == (path, getattr(spec, path))
    assert str(here.value) == str(there.value)


def test_another_error_of_the_corpus_is_of_its_source(tmp_path):
    (tmp_path / "a.jsonl").write_text("{\n")
    spec = DataSpec(source=str(tmp_path), context=16)
    with pytest.raises(FieldError, match="is no JSON") as refused:
        inspect_corpus(spec)
    assert (refused.value.path, refused.value.value) == ("source", str(tmp_path))


def test_facts_cross_the_process_unchanged(tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"{n} words of a text\n" for n in range(4000)))
    spec = DataSpec(source=str(tmp_path), context=16, tokenizer="bpe:300")
    assert inspect_corpus(spec) == inspect_here(spec)


def test_the_process_answers_one_object_and_says_by_its_code_what_it_is(tmp_path):
    """The protocol: facts with code 0, the three parts of a FieldError with BAD_SPEC."""
    spec = DataSpec(source=str(tmp_path), context=16, **write_bin(tmp_path))
    found = inspection.run_module(
        inspection.__name__,
        text=f"{spec.model_dump_json()}\nnull",
        seconds=60,
        too_slow="too slow",
    )
    answer = json.loads(found.stdout)
    assert (found.returncode, set(answer)) == (BAD_SPEC, {"path", "value", "message"})
    assert (answer["path"], answer["value"]) == ("token_dtype", None)


def test_a_crash_is_no_fault_of_the_spec(tmp_path, monkeypatch):
    def crash(*_, **__):
        return subprocess.CompletedProcess([], 1, stdout="", stderr="Killed\n")

    monkeypatch.setattr(inspection, "run_module", crash)
    with pytest.raises(RuntimeError, match=f"inspection of {tmp_path} failed: Killed"):
        inspect_corpus(DataSpec(source=str(tmp_path), tokenizer="bpe:300"))
