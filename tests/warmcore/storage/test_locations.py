"""A checkpoint's URI names the same place for all readers."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from warmcore.storage.file_facts import MANIFEST
from warmcore.storage.locations import delete_checkpoint, find_filesystem, local_path

# `%20` in a name is three characters of the name, and its URI has `%2520`.
names = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/\0"), min_size=1)
paths = st.lists(names, min_size=1, max_size=3).map(lambda parts: Path("/", *parts))


@given(paths)
def test_the_uri_of_a_path_and_the_path_itself_name_the_same(path):
    assert local_path(path.as_uri()) == path


@pytest.mark.parametrize("path", ["/a b", "runs/base", "./x%20y", "a/b:c"])
def test_a_plain_path_is_taken_as_it_is(path):
    assert local_path(path) == Path(path)


@pytest.mark.parametrize("uri", ["s3://bucket/folder", "memory://x", "http://host/x"])
def test_an_object_store_has_no_path(uri):
    assert local_path(uri) is None


@pytest.mark.parametrize("name", ["plain", "with space", "with%20percent", "ü"])
def test_a_folder_is_found_and_deleted_by_its_uri(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    (folder / MANIFEST).write_text("{}")
    # fsspec takes `%20` of a URI for three characters of the name.
    files, root = find_filesystem(folder.as_uri())
    assert (root, files.exists(f"{root}/{MANIFEST}")) == (str(folder), True)
    delete_checkpoint(folder.as_uri())
    assert not folder.exists()
    # A second time nothing is there, and that is no error.
    delete_checkpoint(folder.as_uri())
