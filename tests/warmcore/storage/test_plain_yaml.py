"""Any spec file gives a spec or a message about the fault, in bounded time."""

import contextlib
import copy
import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from service.cli.spec_file import SpecError, load_spec
from service.specs.study import StudySpec
from warmcore import __main__ as command
from warmcore.run_file import read_spec
from warmcore.specs import RunSpec
from warmcore.storage import plain_yaml

EXAMPLES = Path(__file__).parents[3] / "examples"
# Values of every type, and strings that look like paths, URIs, numbers or booleans.
JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["~nosuchuser/x", "s3://a/b", "file:///nope", "http://[x", "1e-3", "on", ""]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)
# 2^60 values in 61 lines.
LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{i + 1}: &a{i + 1} [*a{i}, *a{i}]\n" for i in range(60))
# A part of the refusal, and the file.
HOSTILE = {
    "line 1: more than 50000": "[" + "1, " * 60_000 + "]",
    "with its aliases written out": LAUGHS,
    "tag !!python/object/apply:os.system": "!!python/object/apply:os.system [echo]",
    "an alias to a value that contains the alias": "&a {b: [*a]}",
    r"'\\t'": "a:\n\t- b",
    "byte 0xff at offset 6 is not UTF-8": b"name: \xff",
    "save the file as UTF-8": "name: x".encode("utf-16"),
    "character #x0000": b"name: a\0b",
    "longer than 256 KiB": "x: " + "y" * 1_000_000,
    "nested": "[" * 20_000,
    "nested more than 100 deep": "[" * 110 + "]" * 110,
    "is no int": "a: " + "9" * 5000,
    "is no bool": "a: !!bool x",
    "'a' is given twice": "b: {a: 1, a: 2}",
    "as a key; a name works": "? [a]\n: b",
    "single document": "a: 1\n---\nb: 2",
    "mapping or list of mappings for merging": "<<: 3",
}


def read_both_ways(path):
    """Yield the result of both readers for a file: a spec, or the message of a refusal."""
    for read, refusal in ((read_spec, ValueError), (lambda p: load_spec(p, p.parent), SpecError)):
        try:
            yield read(path)
        except refusal as error:
            yield str(error) or pytest.fail("a refusal that says nothing")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("yaml") / "spec.yaml"


@pytest.mark.parametrize("refusal", HOSTILE)
def test_a_hostile_file_is_refused_by_both_readers_and_by_the_command(path, refusal, caplog):
    text = HOSTILE[refusal]
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    for refused in read_both_ways(path):
        assert isinstance(refused, str)
        assert refused.startswith(str(path))
        assert refusal.replace("\\\\", "\\") in refused
        # A message does not repeat the file.
        assert len(refused) < 1000
    assert command.main([str(path)]) == 2
    assert "Traceback" not in caplog.text


@given(
    text=st.binary(max_size=200) | st.text(max_size=200).map(lambda t: t.encode("utf-8", "replace"))
)
@settings(max_examples=200)
def test_any_file_is_read_or_refused(path, text):
    path.write_bytes(text)
    for made in read_both_ways(path):
        assert isinstance(made, str | dict | RunSpec)


@given(data=st.data())
@settings(max_examples=100)
def test_any_change_to_an_example_is_accepted_or_refused(path, data):
    """Keys dropped, renamed, replaced by junk, or put where they do not belong."""
    name = data.draw(st.sampled_from(["run.yaml", "study.yaml"]))
    spec = yaml.safe_load((EXAMPLES / name).read_text())
    for _ in range(data.draw(st.integers(1, 3))):
        change_spec(data, spec)
    path.write_text(yaml.safe_dump(spec, allow_unicode=False))
    for made in read_both_ways(path):
        if isinstance(made, dict):
            try_as_study(made)


def change_spec(data, spec):
    places = list(list_mappings(spec))
    if not places:
        return
    place = data.draw(st.sampled_from(places))
    key = data.draw(st.sampled_from(sorted(place, key=str)))
    match data.draw(st.sampled_from(["drop", "junk", "rename", "graft"])):
        case "drop":
            del place[key]
        case "junk":
            place[key] = data.draw(JUNK)
        case "rename":
            place[data.draw(st.text(max_size=8))] = place.pop(key)
        case "graft":
            place[key] = copy.deepcopy(spec)


def list_mappings(value):
    if isinstance(value, dict):
        if value:
            yield value
        for inner in value.values():
            yield from list_mappings(inner)


def try_as_study(spec):
    """Validate the spec as the service would: only a ValueError may be raised."""
    with contextlib.suppress(ValueError):
        StudySpec.model_validate(json.loads(json.dumps(spec)))


def test_a_date_is_text_and_a_byte_order_mark_is_nothing(path):
    # Editors on Windows write a byte order mark.
    path.write_bytes(b"\xef\xbb\xbfname: 2020-01-01")
    assert plain_yaml.read_yaml(path) == {"name": "2020-01-01"}
