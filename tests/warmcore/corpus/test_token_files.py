"""Token files are read in place, checked, and divided by blocks."""

import io
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from warmcore.corpus import prepare as data_module
from warmcore.corpus.inspection import inspect_here
from warmcore.corpus.prepare import prepare_corpus
from warmcore.corpus.tokenizer import make_byte_json
from warmcore.specs import DataSpec
from warmcore.training.batches import read_windows

CONTEXT = 8
VOCAB = 1000


def make_spec(source, **fields):
    fields = {"tokenizer": "none", "vocab_size": VOCAB, "context": CONTEXT} | fields
    return DataSpec(source=str(source), **fields)


def make_ids(seed, num_tokens, dtype="uint16"):
    return np.random.default_rng(seed).integers(0, VOCAB, num_tokens).astype(dtype)


def write_ids(path, tokens):
    if path.suffix == ".npy":
        np.save(path, tokens)
    else:
        path.write_bytes(tokens.tobytes())


@given(
    st.lists(st.integers(1, 900), min_size=1, max_size=4),
    st.sampled_from(["uint16", "uint32"]),
    st.sampled_from([".npy", ".bin"]),
    st.floats(0.02, 0.5),
)
def test_each_token_is_on_one_side_in_blocks_of_its_file(
    tmp_path_factory, sizes, dtype, suffix, fraction
):
    folder = tmp_path_factory.mktemp("shards")
    shards = [make_ids(number, size, dtype) for number, size in enumerate([400, *sizes])]
    for number, shard in enumerate(shards):
        write_ids(folder / f"{number}{suffix}", shard)
    spec = make_spec(folder, val_fraction=fraction, token_dtype=dtype)
    corpus = prepare_corpus(spec, folder.parent / f"{folder.name}-cache")
    # Every id of every file, by file and offset: none is missing, none is on both sides.
    places = [
        (block.path.stem, (block.offset + k * np.dtype(dtype).itemsize))
        for side in (corpus.train, corpus.val)
        for block in side.blocks
        for k in range(block.num_tokens)
    ]
    assert len(set(places)) == len(places) == sum(map(len, shards))
    train, val = (read_windows(side, np.arange(1), len(side) - 1) for side in list_sides(corpus))
    every = np.sort(np.concatenate([train.numpy().ravel(), val.numpy().ravel()]))
    assert np.array_equal(every, np.sort(np.concatenate(shards)))


def list_sides(corpus):
    return corpus.train, corpus.val


def test_a_block_that_occurs_twice_is_on_one_side(tmp_path):
    tokens = make_ids(0, 900)
    for name in ("a.npy", "b.npy"):
        write_ids(tmp_path / name, tokens)
    corpus = prepare_corpus(make_spec(tmp_path), tmp_path / "cache")
    train, val = ({block.hash for block in side.blocks} for side in list_sides(corpus))
    assert not train & val
    assert corpus.num_train_tokens + corpus.num_val_tokens == 900


def test_windows_across_blocks_are_those_of_the_tokens_laid_end_to_end(tmp_path):
    write_ids(tmp_path / "a.npy", make_ids(0, 5000))
    corpus = prepare_corpus(make_spec(tmp_path / "a.npy"), tmp_path / "cache")
    laid = np.concatenate([block.ids for block in corpus.train.blocks])
    windows = np.array([0, 3, (len(laid) - 1) // CONTEXT - 1])
    assert len(corpus.train.blocks) > 10
    found = read_windows(corpus.train, windows, CONTEXT)
    assert np.array_equal(found, read_windows(laid, windows, CONTEXT))


def test_shards_are_mapped_and_neither_copied_nor_read_twice(tmp_path, monkeypatch):
    write_ids(tmp_path / "a.bin", make_ids(0, 100_000))
    spec, cache = make_spec(tmp_path / "a.bin", token_dtype="uint16"), tmp_path / "cache"  # noqa: S106
    before = prepare_corpus(spec, cache)
    assert sum(file.stat().st_size for file in cache.iterdir()) < 100_000  # of 200 000
    assert not before.train.blocks[0].ids.flags.owndata
    assert inspect_here(spec).data_hash == before.data_hash
    data_module._open_token_files.cache_clear()
    monkeypatch.setattr(data_module.token_files, "split_shards", None)
    again = prepare_corpus(spec, cache)
    assert again.data_hash == before.data_hash
    assert np.array_equal(again.train.blocks, before.train.blocks)


def test_the_tokenizer_that_made_the_shards_says_the_vocabulary(tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(make_byte_json())
    write_ids(tmp_path / "a.npy", make_ids(0, 5000) % 256)
    named = make_spec(
        tmp_path / "a.npy", tokenizer=str(tmp_path / "tokenizer.json"), vocab_size=None
    )
    corpus = prepare_corpus(named, tmp_path / "cache")
    assert (corpus.vocab_size, corpus.tokenizer_json) == (256, make_byte_json())
    nobody = prepare_corpus(make_spec(tmp_path / "a.npy"), tmp_path / "cache")
    assert (nobody.tokenizer, nobody.vocab_size) == (None, VOCAB)


def read_refusal(source, **fields):
    with pytest.raises(ValueError) as caught:
        inspect_here(make_spec(source, **fields))
    return str(caught.value)


@pytest.mark.parametrize("name", ["a.npy", "a.bin"])
def test_an_id_beyond_the_vocabulary_is_named_with_its_place(tmp_path, name):
    tokens = make_ids(0, 5000)
    tokens[4321] = VOCAB
    write_ids(tmp_path / name, tokens)
    message = read_refusal(tmp_path / name, token_dtype="uint16")  # noqa: S106 - no password
    assert f"{name} holds id 1000 at token 4321, beyond vocab_size 1000; at least 1001" in message


def cut_npy():
    file = io.BytesIO()
    np.save(file, make_ids(0, 500))
    return file.getvalue()[:-2]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.bin", b"\0" * 100, "has no header; set token_dtype to uint16 or uint32"),
        ("a.npy", b"\0" * 100, "is no .npy file"),
        ("a.npy", cut_npy(), "ends before the 500 tokens that its header names"),
        ("a.npy", np.zeros((9, 9), "uint16"), "one dimension of little-endian uint16 or uint32"),
        ("a.npy", np.zeros(99, "int64"), "one dimension of little-endian uint16 or uint32"),
        ("a.npy", np.zeros(99, ">u2"), "one dimension of little-endian uint16 or uint32"),
        ("a.npy", np.zeros(5, "uint16"), "each need at least context + 1 = 9"),
    ],
)
def test_a_file_that_is_no_shard_is_refused_with_what_would_work(tmp_path, name, content, message):
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    else:
        np.save(tmp_path / name, content)
    assert message in read_refusal(tmp_path / name)


def test_tokens_need_who_made_them_and_do_not_mix_with_text(tmp_path):
    write_ids(tmp_path / "a.npy", make_ids(0, 500))
    message = read_refusal(tmp_path, tokenizer="byte", vocab_size=None)
    assert "holds tokens that tokenizer byte did not make" in message
    (tmp_path / "meta.json").write_text(json.dumps({}))
    assert "a glob like shards/*.npy takes the files of a single kind" in read_refusal(tmp_path)
    assert "holds text" in read_refusal(tmp_path / "meta.json")
    (tmp_path / "b.npy").write_bytes((tmp_path / "a.npy").read_bytes())
    write_ids(tmp_path / "c.npy", make_ids(0, 500, "uint32"))
    assert "mixes uint16" in read_refusal(tmp_path / "*.npy")
    assert read_refusal(tmp_path / "a.bin", token_dtype="uint16").endswith("or hf:NAME")  # noqa: S106
    message = "tokenizer none does not say how many ids there are; give vocab_size"
    with pytest.raises(ValueError, match=message):
        make_spec(tmp_path, vocab_size=None)
