"""A restored backup has the same rows, or nothing changed, and its studies go on."""

import json
import os
import signal
import stat
import subprocess
import sys
import time
import zipfile

import httpx
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError
from typer.testing import CliRunner

from service.cli.main import app
from service.operations import migrations
from service.operations.backup import archive, catalog
from service.operations.backup.archive import BackupError
from service.operations.backup.dump import write_backup
from service.operations.backup.load import InUseError, NotEmptyError, restore_backup
from service.operations.revisions import NewerDatabaseError
from tests.by_hand import Worker
from tests.conftest import create_database, serve_api
from tests.service.operations.scenario import play
from tests.service.operations.test_migrations import (
    HEAD,
    REVISIONS,
    connected,
    end_all,
    fresh,
    sample,
    standing,
)

runner = CliRunner()


def silent(*_):
    pass


@pytest.fixture
def empty_url(postgres):
    with fresh(postgres, "restored") as url:
        yield url


@pytest.fixture
def head_file(tmp_path):
    """Return the path of the newest sample, as the backup of a team."""
    return sample(HEAD)


def everything(url):
    """Return every row of every table, the number of every sequence, and every foreign key."""
    with connected(url) as connection:
        rows = {
            (t.schema, t.name): sorted(
                map(repr, connection.execute(text(f"SELECT * FROM {t.schema}.{t.name}")).all())
            )
            for t in catalog.list_tables(connection)
        }
        return rows, catalog.list_sequences(connection), catalog.list_foreign_keys(connection)


def restored(url, path, **more):
    return restore_backup(url, path, silent, **({"replace": False} | more))


def test_a_backup_of_a_running_service_restores_to_the_same_rows_and_goes_on_to_the_end(
    postgres, settings, empty_url, tmp_path
):
    path = tmp_path / "team.backup"
    with create_database(postgres) as url:
        with serve_api(settings, url) as api:
            play(Worker(api.client))
            manifest = write_backup(url, path, silent)
        before = everything(url)
    assert manifest.num_rows == sum(map(len, before[0].values())) > 100
    restored(empty_url, path)
    assert everything(empty_url) == before
    assert standing(empty_url) == {"warmscale": "ready", "optuna": "ready"}
    with serve_api(settings, empty_url) as api:
        end_all(api)


def test_a_backup_is_of_one_moment_while_writes_go_on(empty_url, tmp_path):
    migrations.upgrade_database(empty_url)

    def write(name, _):
        # The tables are read by name: `aaa` has been read at this moment, and `zzz` not yet.
        if name == "warmscale.aaa":
            with connected(empty_url) as connection:
                for table in ("aaa", "zzz"):
                    connection.execute(text(f"INSERT INTO warmscale.{table} VALUES (1)"))

    with connected(empty_url) as connection:
        for name in ("aaa", "zzz"):
            connection.execute(text(f"CREATE TABLE warmscale.{name} (x int)"))
    write("warmscale.aaa", 0)
    manifest = write_backup(empty_url, tmp_path / "moment", write)
    counts = {table.name: table.num_rows for table in manifest.tables}
    # Both have the row from before the backup, and neither has the row that came during it.
    assert (counts["aaa"], counts["zzz"]) == (1, 1)


@pytest.mark.parametrize("revision", REVISIONS)
def test_a_backup_of_any_earlier_revision_is_upgraded(empty_url, revision):
    manifest = restored(empty_url, sample(revision))
    assert standing(empty_url) == {"warmscale": "ready", "optuna": "ready"}
    with connected(empty_url) as connection:
        counts = {
            t.name: catalog.count_rows(connection, t) for t in catalog.list_tables(connection)
        }
    assert {t.name: t.num_rows for t in manifest.tables}.items() <= counts.items()


def test_the_same_database_gives_the_same_tables_byte_for_byte(empty_url, tmp_path):
    restored(empty_url, sample(HEAD))
    first, second = (write_backup(empty_url, tmp_path / name, silent) for name in "ab")
    assert [t.sha256 for t in first.tables] == [t.sha256 for t in second.tables]


def test_a_backup_can_be_read_by_its_user_alone_and_replaces_no_file(empty_url, tmp_path):
    restored(empty_url, sample(HEAD))
    path = tmp_path / "mine"
    write_backup(empty_url, path, silent)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    content = path.read_bytes()
    with pytest.raises(BackupError, match="exists; a backup replaces no file"):
        write_backup(empty_url, path, silent)
    assert path.read_bytes() == content
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_a_backup_that_fails_leaves_no_file(postgres, tmp_path):
    with fresh(postgres, "nothing") as url, pytest.raises(BackupError, match="no tables yet"):
        write_backup(url, tmp_path / "x", silent)
    assert list(tmp_path.iterdir()) == []


def test_only_what_is_said_is_replaced(empty_url, head_file):
    restored(empty_url, head_file)
    with connected(empty_url) as connection:
        connection.execute(text("UPDATE warmscale.studies SET reason = 'changed'"))
    before = everything(empty_url)
    with pytest.raises(NotEmptyError, match=r"not empty .*studies.*--replace deletes"):
        restored(empty_url, head_file)
    assert everything(empty_url) == before
    restored(empty_url, head_file, replace=True)
    assert everything(empty_url) != before


def test_nothing_is_restored_under_a_running_service(empty_url, settings, head_file):
    migrations.upgrade_database(empty_url)
    with (
        serve_api(settings, empty_url) as api,
        pytest.raises(InUseError, match="stop the service first"),
    ):
        api.client.get("/v1/studies")
        restored(empty_url, head_file, replace=True)
    with connected(empty_url) as connection:
        assert connection.execute(text("SELECT count(*) FROM warmscale.studies")).scalar() == 0


def test_a_backup_of_a_later_version_is_refused(empty_url, head_file, tmp_path):
    later = rewritten(head_file, tmp_path / "later", revisions={"warmscale": "9999", "optuna": "x"})
    with pytest.raises(NewerDatabaseError, match="9999"):
        restored(empty_url, later)


def rewritten(path, to, **changes):
    """Write the same tables under another manifest to `to`, and return that path."""
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(to, "w") as target:
        manifest = json.loads(source.read(archive.MANIFEST)) | changes
        for name in source.namelist():
            if name != archive.MANIFEST:
                target.writestr(name, source.read(name))
        target.writestr(archive.MANIFEST, json.dumps(manifest))
    return to


def contents(path):
    with archive.open_backup(path) as reader:
        reader.check_hashes(lambda _: None)
        return reader.manifest, [b"".join(reader.read_rows(t)) for t in reader.manifest.tables]


@hypothesis_settings(max_examples=150)
@given(st.data())
def test_a_damaged_backup_is_refused_or_says_the_same(tmp_path_factory, data):
    whole = sample(HEAD).read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    damage = data.draw(st.sampled_from(["cut", "flip", "zero"]))
    # Cut the file, flip a bit, or zero up to 512 bytes, a disk's sector.
    broken = {
        "cut": whole[:at],
        "flip": whole[:at] + bytes([whole[at] ^ (1 << at % 8)]) + whole[at + 1 :],
        "zero": whole[:at] + bytes(min(512, len(whole) - at)) + whole[at + 512 :],
    }[damage]
    path = tmp_path_factory.mktemp("damaged") / "backup"
    path.write_bytes(broken)
    try:
        found = contents(path)
    except BackupError:
        return
    assert found == contents(sample(HEAD))


def test_a_wrong_table_is_told_by_its_hash(tmp_path, head_file):
    """Change rows in a valid zip: only the manifest's hash can reveal it."""
    to = tmp_path / "swapped"
    with zipfile.ZipFile(head_file) as source, zipfile.ZipFile(to, "w") as target:
        for name in source.namelist():
            content = source.read(name)
            target.writestr(name, content.replace(b"cancelled", b"completed"))
    with pytest.raises(BackupError, match="its manifest says"):
        contents(to)


def test_rows_that_break_a_foreign_key_are_refused_and_nothing_changes(
    empty_url, head_file, tmp_path
):
    # Without the runs, their measurements refer to nothing.
    manifest = json.loads(zipfile.ZipFile(head_file).read(archive.MANIFEST))
    kept = [t for t in manifest["tables"] if (t["schema_name"], t["name"]) != ("warmscale", "runs")]
    orphaned = rewritten(head_file, tmp_path / "orphaned", tables=kept)
    with pytest.raises(IntegrityError, match="foreign key"):
        restored(empty_url, orphaned)
    assert standing(empty_url) == {"warmscale": "empty", "optuna": "empty"}


def test_events_of_a_server_that_was_ahead_are_the_past(empty_url, tmp_path, settings):
    migrations.upgrade_database(empty_url)
    with serve_api(settings, empty_url) as api:
        play(Worker(api.client))
    # Transaction numbers of a server that is a billion transactions ahead.
    with connected(empty_url) as connection:
        connection.execute(text("ALTER TABLE warmscale.events DISABLE TRIGGER append_only"))
        connection.execute(text("UPDATE warmscale.events SET xid = xid + 1000000000"))
        connection.execute(text("ALTER TABLE warmscale.events ENABLE TRIGGER append_only"))
    write_backup(empty_url, tmp_path / "ahead", silent)
    restored(empty_url, tmp_path / "ahead", replace=True)
    with serve_api(settings, empty_url) as api:
        ended = [s for s in api.client.get("/v1/studies")["items"] if s["state"] == "failed"]
        url = f"{api.url}/v1/studies/{ended[0]['id']}/events"
        headers = {"Authorization": f"Bearer {api.key}"}
        seen = [
            line
            for line in httpx.get(url, headers=headers, timeout=10).text.splitlines()
            if line.startswith("event: ")
        ]
    assert seen[0] == "event: study.created"
    assert seen[-1] == "event: study.failed"


# A restore that waits in the middle of a table, for the test to kill it.
KILLED = """
import sys
from pathlib import Path
from service.database import engine
from service.operations.backup import load
engine.use_utc()
def stop(name, size):
    if name == "warmscale.runs":
        print("in the middle", flush=True)
        import time
        time.sleep(60)
load.restore_backup(engine.normalize_url(sys.argv[1]), Path(sys.argv[2]), stop, replace=True)
"""


def test_a_restore_that_is_killed_has_changed_nothing(empty_url, head_file):
    restored(empty_url, head_file)
    with connected(empty_url) as connection:
        connection.execute(text("UPDATE warmscale.studies SET reason = 'before'"))
    before = everything(empty_url)
    url = empty_url.render_as_string(hide_password=False)
    command = [sys.executable, "-c", KILLED, url, str(head_file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "in the middle\n"
        os.kill(process.pid, signal.SIGKILL)
    until_alone(empty_url)
    assert everything(empty_url) == before


def until_alone(url):
    """Wait until the server has noticed the end of its client and rolled back."""
    # It notices when it next reads from the connection.
    with connected(url) as connection:
        while catalog.list_other_connections(connection) or locks(connection):
            time.sleep(0.02)


def locks(connection):
    query = "SELECT count(*) FROM pg_locks WHERE mode = 'AccessExclusiveLock' AND granted"
    return connection.execute(text(query)).scalar()


def test_the_command_line_backs_up_and_restores(monkeypatch, empty_url, head_file, tmp_path):
    url = empty_url.render_as_string(hide_password=False)
    monkeypatch.setenv("WARMSCALE_DATABASE_URL", url)
    first = runner.invoke(app, ["db", "restore", str(head_file), "--json"])
    assert first.exit_code == 0, first.output
    assert "revoked since the backup are good again" in first.stderr
    assert json.loads(first.stdout)["revisions"]["warmscale"] == HEAD
    again = runner.invoke(app, ["db", "restore", str(head_file)])
    assert (again.exit_code, "--replace" in again.stderr) == (4, True)
    made = runner.invoke(app, ["db", "backup", str(tmp_path / "b")])
    assert made.exit_code == 0, made.output
    assert f"warmscale {HEAD}" in made.stdout
    missing = runner.invoke(app, ["db", "restore", str(tmp_path / "none")])
    assert (missing.exit_code, "cannot read" in missing.stderr) == (4, True)
    wrong = runner.invoke(app, ["db", "restore", __file__])
    assert (wrong.exit_code, "is no backup" in wrong.stderr) == (4, True)
