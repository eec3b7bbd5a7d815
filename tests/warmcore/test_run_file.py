"""Checkpoints that a run's file names must be on this machine."""

import pytest

from warmcore.run_file import require_local_path


@pytest.mark.parametrize("spell", [str, lambda path: path.as_uri()])
@pytest.mark.parametrize("name", ["base", "with space", "with%20percent", "ü"])
def test_a_path_and_its_uri_name_the_same_folder(tmp_path, name, spell):
    assert require_local_path(spell(tmp_path / name), "trunk") == tmp_path / name


def test_a_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert require_local_path("~/base", "trunk") == tmp_path / "base"
    assert require_local_path("file:~/base", "trunk") == tmp_path / "base"


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("s3://bucket/base", r"^growth\.base\.uri s3://bucket/base is not local; a path or a file"),
        # Linux limits a name to 255 bytes.
        ("x" * 5000, r"^growth\.base\.uri 'x+' is no path: .*File name too long"),
        ("~nosuchuser/base", r"^growth\.base\.uri '~nosuchuser/base' is no path"),
        ("file://[x/base", r"^growth\.base\.uri .* is no path: Invalid IPv6 URL"),
    ],
)
def test_a_uri_that_names_no_path_here_is_refused(uri, message):
    with pytest.raises(ValueError, match=message):
        require_local_path(uri, "growth.base")
