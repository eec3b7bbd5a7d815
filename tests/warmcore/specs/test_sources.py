"""Every name of a source or a tokenizer becomes a single type."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from warmcore.specs import DataSpec
from warmcore.specs.sources import (
    HUB_PREFIX,
    BpeTokens,
    ByteTokens,
    Files,
    HubDataset,
    NoTokenizer,
    SavedDataset,
    StandardLibrary,
    TokenizerFile,
    parse_source,
    parse_tokenizer,
)


@pytest.mark.parametrize(
    ("name", "parsed"),
    [
        ("byte", ByteTokens()),
        ("none", NoTokenizer()),
        ("bpe:257", BpeTokens(257)),
        ("bpe:1048576", BpeTokens(2**20)),
        ("bpe:004096", BpeTokens(4096)),
        ("tokenizer.json", TokenizerFile(Path("tokenizer.json"))),
        ("~/models/x.json", TokenizerFile(Path("~/models/x.json"))),
        # Every name that ends with .json is a path.
        ("bpe:400.json", TokenizerFile(Path("bpe:400.json"))),
        ("byte.json", TokenizerFile(Path("byte.json"))),
    ],
)
def test_a_tokenizers_name_becomes_a_type(name, parsed):
    assert parse_tokenizer(name) == parsed
    spec = DataSpec(source="stdlib", tokenizer=name, vocab_size=1 if name == "none" else None)
    assert spec.parsed_tokenizer == parsed


def test_a_bpe_tokenizer_has_one_spelling():
    """The data hash contains the spelling: equal tokenizers must be equal strings."""
    assert DataSpec(source="stdlib", tokenizer="bpe:004096").tokenizer == "bpe:4096"


@given(st.text(max_size=20))
def test_a_name_is_parsed_where_a_spec_takes_it_and_nowhere_else(name):
    # `none` needs the number of ids, and no other name admits another number.
    size = 1 if name == "none" else None
    try:
        spec = DataSpec(source="stdlib", tokenizer=name, vocab_size=size)
    except ValidationError:
        with pytest.raises(ValueError, match="would work"):
            parse_tokenizer(name)
    else:
        assert parse_tokenizer(name) == parse_tokenizer(spec.tokenizer) == spec.parsed_tokenizer


# Signs, exponents, digits of other scripts, and more digits than `int` converts.
@pytest.mark.parametrize("size", ["", "256", "1048577", "-300", "3e3", "²57", "٣٠٠", "9" * 5000])
def test_a_size_that_is_none_or_out_of_bounds_is_refused_with_what_works(size):
    with pytest.raises(ValueError, match=r"bpe:\d+.* would work"):
        parse_tokenizer(f"bpe:{size}")


@pytest.mark.parametrize(
    ("source", "parsed"),
    [
        ("stdlib", StandardLibrary()),
        ("./stdlib", Files("./stdlib")),
        ("text/**/*.md", Files("text/**/*.md")),
        ("s3://bucket/x", Files("s3://bucket/x")),
        ("", Files("")),
        ("hf:wikitext", HubDataset("wikitext")),
        ("hf:Salesforce/wikitext:wikitext-2-v1", HubDataset("Salesforce/wikitext:wikitext-2-v1")),
        ("hf:", HubDataset("")),
        ("hf:./saved", SavedDataset(Path("./saved"))),
        ("hf:/data/saved", SavedDataset(Path("/data/saved"))),
        ("hf:~/saved", SavedDataset(Path("~/saved"))),
        ("hf:hf:./saved", HubDataset("hf:./saved")),
    ],
)
def test_a_source_becomes_a_type(source, parsed):
    assert parse_source(source) == parsed
    if source:
        assert DataSpec(source=source).parsed_source == parsed


@given(st.text(max_size=20), st.booleans())
def test_every_source_is_of_one_type_and_keeps_its_text(text, is_hub):
    source = HUB_PREFIX * is_hub + text
    match parse_source(source):
        case StandardLibrary():
            assert source == "stdlib"
        case Files(pattern):
            assert pattern == source
        case HubDataset(name):
            assert HUB_PREFIX + name == source
        case SavedDataset(path):
            assert path == Path(source.removeprefix(HUB_PREFIX))
