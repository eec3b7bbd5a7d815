"""Patterns find the files that `glob` finds, each file a single time, and the walk ends."""

import glob
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from warmcore.corpus import glob_patterns
from warmcore.corpus.glob_patterns import find_matches
from warmcore.corpus.sources import list_files

names = st.sampled_from(["a", "b.txt", ".c", "ab"])
trees = st.lists(st.lists(names, min_size=1, max_size=3).map("/".join), max_size=8)
parts = st.sampled_from(["*", "?", "a*", ".*", "[ab]*", "*.txt", "a"])


@st.composite
def make_pattern(draw):
    found = draw(st.lists(parts, min_size=1, max_size=3))
    # At most a single `**`: patterns with two are refused.
    if draw(st.booleans()):
        found.insert(draw(st.integers(0, len(found))), "**")
    return "/".join(found) if glob.has_magic("/".join(found)) else "*"


@settings(max_examples=200)
@given(trees, make_pattern())
def test_the_files_found_are_those_that_glob_finds(tmp_path_factory, tree, pattern):
    root = tmp_path_factory.mktemp("tree")
    for path in tree:
        (root / path).mkdir(parents=True, exist_ok=True)
        (root / path / "text.txt").touch()
    expected = {Path(p) for p in glob.glob(f"{root}/{pattern}", recursive=True)}  # noqa: PTH207
    found = list(find_matches(root / pattern))
    assert {p for p in found if p.is_file()} == {p for p in expected if p.is_file()}
    # Sets would hide a path that is yielded twice.
    assert len(found) == len(set(found))
    shutil.rmtree(root)


@pytest.fixture
def looped_folder(tmp_path):
    """A folder with a file two levels down, and links to the top in each of its folders."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "one.txt").write_text("text\n")
    for folder in (tmp_path, tmp_path / "a", tmp_path / "a" / "b"):
        # With 4 links up in each folder, a walk that follows them lists more than 4^n folders for
        # n stars.
        for i in range(4):
            (folder / f"up{i}").symlink_to(tmp_path)
    return tmp_path


@pytest.mark.parametrize("pattern", ["*/*/*", "*/*/*.txt", "**/*.txt", "a/*/*", "**"])
def test_a_file_is_found_once_however_many_links_lead_back_to_its_parents(looped_folder, pattern):
    (found,) = list_files(f"{looped_folder}/{pattern}")
    assert found.path == looped_folder / "a" / "b" / "one.txt"


def test_links_round_about_end(tmp_path, monkeypatch):
    """Two folders with links to each other; neither is inside of the other."""
    for here, there in (("a", "b"), ("b", "a")):
        (tmp_path / here).mkdir()
        (tmp_path / here / "one.txt").write_text(here)
        (tmp_path / here / "over").symlink_to(tmp_path / there)
    monkeypatch.setattr(glob_patterns, "_MOST_LOOKS", 30)
    assert len(list_files(f"{tmp_path}/*/*/*.txt")) == 2
    with pytest.raises(ValueError, match="matches no files"):
        list_files(f"{tmp_path}/{'*/' * 40}*.txt")


def test_a_link_that_leads_elsewhere_is_followed(tmp_path):
    (tmp_path / "away").mkdir()
    (tmp_path / "away" / "one.txt").write_text("text\n")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link").symlink_to(tmp_path / "away")
    (found,) = list_files(f"{tmp_path}/in/*/*.txt")
    assert found.path == tmp_path / "in" / "link" / "one.txt"


def test_a_walk_that_doubles_at_every_level_is_refused_by_its_pattern(tmp_path, monkeypatch):
    for i in range(20):
        (tmp_path / f"{i}").mkdir()
        for side in "lr":
            (tmp_path / f"{i}" / side).symlink_to(tmp_path / f"{i + 1}")
    # Each folder has two links to the next folder: 2^18 paths, and no link leads back.
    monkeypatch.setattr(glob_patterns, "_MOST_LOOKS", 1000)
    pattern = f"{tmp_path}/0/{'*/' * 18}*"
    with pytest.raises(ValueError, match="more than 1000 folders; a folder, or a pattern") as error:
        list_files(pattern)
    assert pattern in str(error.value)


def test_a_link_to_itself_leads_nowhere(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert list(find_matches(tmp_path / "loop" / "*.txt")) == []
    assert list(find_matches(tmp_path / "*" / "*.txt")) == []
