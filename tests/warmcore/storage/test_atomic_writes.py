"""A file or a folder appears whole, or the content before stays."""

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from warmcore.storage import atomic_writes
from warmcore.storage.atomic_writes import ONLY_THIS_USER, write_file, write_folder


# Hidden names too: they would be the leftovers.
def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def steps(monkeypatch):
    """Record the names of synced and renamed paths, in order."""
    taken = []
    real_sync, real_fsync = atomic_writes._sync, os.fsync
    real_rename, real_link = Path.rename, os.link

    def sync(path):
        taken.append(("sync", path.name if path.name[0] != "." else "aside"))
        real_sync(path)

    # `_sync` calls `os.fsync` on folders, too: those calls are recorded by `sync` alone.
    def fsync(descriptor):
        if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            taken.append(("fsync", os.fstat(descriptor).st_size))
        real_fsync(descriptor)

    def rename(path, target):
        taken.append(("rename", target.name if target.name[0] != "." else "aside"))
        return real_rename(path, target)

    def link(path, target):
        taken.append(("link", target.name))
        real_link(path, target)

    monkeypatch.setattr(atomic_writes, "_sync", sync)
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", rename)
    monkeypatch.setattr(os, "link", link)
    return taken


@pytest.mark.parametrize("before", [None, b"before"])
def test_a_file_appears_after_the_block_and_not_within(tmp_path, before):
    path = tmp_path / "x"
    if before is not None:
        path.write_bytes(before)
    with write_file(path) as file:
        file.write(b"after")
        file.flush()
        assert (path.read_bytes() if path.exists() else None) == before
    assert (path.read_bytes(), names_in(tmp_path)) == (b"after", ["x"])


def test_a_block_that_raises_leaves_the_file_that_was_there(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"before")
    with pytest.raises(KeyboardInterrupt), write_file(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert (path.read_bytes(), names_in(tmp_path)) == (b"before", ["x"])


def test_a_file_is_synced_before_its_rename_and_its_folder_afterwards(tmp_path, steps):
    with write_file(tmp_path / "x") as file:
        file.write(b"12345")
    assert steps == [("fsync", 5), ("rename", "x"), ("sync", tmp_path.name)]


def test_a_file_that_came_meanwhile_is_replaced_or_kept_as_asked(tmp_path, steps):
    for replace, expected in ((True, b"ours"), (False, b"theirs")):
        path = tmp_path / str(replace)
        try:
            with write_file(path, replace=replace) as file:
                file.write(b"ours")
                path.write_bytes(b"theirs")
        except FileExistsError:
            assert not replace
        assert path.read_bytes() == expected
    assert names_in(tmp_path) == ["False", "True"]
    assert steps[-2:] == [("fsync", 4), ("link", "False")]


def test_a_private_file_is_private_from_its_first_byte_on(tmp_path):
    with write_file(tmp_path / "x", mode=ONLY_THIS_USER):
        # With a later chmod, others could open the file for a moment.
        (aside,) = tmp_path.iterdir()
        assert stat.S_IMODE(aside.stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o600


def test_a_public_file_has_the_mode_of_any_new_file(tmp_path):
    (tmp_path / "plain").write_bytes(b"")
    with write_file(tmp_path / "x"):
        pass
    assert (tmp_path / "x").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_folder_that_is_not_there_is_an_error_of_the_system(tmp_path):
    with pytest.raises(FileNotFoundError), write_file(tmp_path / "missing" / "x"):
        pass
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(NotADirectoryError), write_file(tmp_path / "file" / "x"):
        pass


@pytest.mark.parametrize("may_lose", [False, True])
def test_a_new_folder_is_synced_file_by_file_before_it_appears(tmp_path, steps, may_lose):
    path = tmp_path / "below" / "folder"
    with write_folder(path, may_lose=may_lose) as aside:
        (aside / "a").write_bytes(b"1")
        assert not path.exists()
    assert (names_in(path), names_in(tmp_path / "below")) == (["a"], ["folder"])
    synced = [step for step in steps if step[0] != "fsync"]
    assert synced == [("sync", "a"), ("sync", "aside"), ("rename", "folder"), ("sync", "below")]


def test_a_folder_replaces_the_one_before(tmp_path):
    for name in ("a", "b"):
        with write_folder(tmp_path / "folder") as aside:
            (aside / name).write_bytes(b"1")
    assert (names_in(tmp_path / "folder"), names_in(tmp_path)) == (["b"], ["folder"])


@pytest.mark.parametrize("may_lose", [False, True])
def test_a_block_that_raises_leaves_the_folder_that_was_there(tmp_path, may_lose):
    with write_folder(tmp_path / "folder") as aside:
        (aside / "a").write_bytes(b"1")
    with (
        pytest.raises(KeyboardInterrupt),
        write_folder(tmp_path / "folder", may_lose=may_lose) as aside,
    ):
        (aside / "b").write_bytes(b"1")
        raise KeyboardInterrupt
    assert (names_in(tmp_path / "folder"), names_in(tmp_path)) == (["a"], ["folder"])


def test_a_second_preparer_of_the_same_content_may_lose(tmp_path):
    path = tmp_path / "folder"
    with write_folder(path, may_lose=True) as ours:
        (ours / "mark").write_bytes(b"ours")
        with write_folder(path, may_lose=True) as theirs:
            (theirs / "mark").write_bytes(b"theirs")
    assert ((path / "mark").read_bytes(), names_in(tmp_path)) == (b"theirs", ["folder"])


def test_a_rename_that_fails_for_another_reason_is_an_error(tmp_path):
    path = tmp_path / "folder"

    def refuse(_self, _target):
        raise PermissionError(1, "not permitted")

    # Nothing is at `path`: no other preparer won.
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(PermissionError),
        write_folder(path, may_lose=True),
    ):
        patch.setattr(Path, "rename", refuse)
    assert names_in(tmp_path) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from warmcore.storage.atomic_writes import write_file, write_folder
path = Path(sys.argv[1])
if sys.argv[2] == "file":
    with write_file(path) as file:
        file.write(b"half")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
with write_folder(path) as aside:
    (aside / "a").write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_killed_process_leaves_a_hidden_entry_that_hinders_no_other(tmp_path, kind):
    path = tmp_path / "x"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(path), kind], check=False)
    assert killed.returncode == -signal.SIGKILL
    # Nothing cleans up after SIGKILL; the entry is hidden, and no later write uses its name.
    (left,) = names_in(tmp_path)
    assert left.startswith(".x-")
    with write_file(path) if kind == "file" else write_folder(path):
        pass
    assert names_in(tmp_path) == [left, "x"]
