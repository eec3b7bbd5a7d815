"""Migrations from an empty database and from every revision with data; down, up, and under load."""

import contextlib
import inspect as python
import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import typer
from alembic import command
from sqlalchemy import create_engine, inspect, text
from typer.testing import CliRunner

from service.cli import serve
from service.cli.main import app
from service.database import engine as db
from service.operations import migrations
from service.operations.backup import archive, catalog, load
from service.operations.migrations import LockBusyError, Patience, list_scripts, read_revisions
from service.operations.revisions import NewerDatabaseError
from service.optuna_bridge import schema as optuna_schema
from service.optuna_bridge.sampler import Sampler
from tests.by_hand import Worker
from tests.conftest import serve_api

runner = CliRunner()
SAMPLES = Path(__file__).with_name("samples")
REVISIONS = [script.revision for script in list_scripts()]
HEAD = REVISIONS[-1]
# The rows that a downgrade loses, as its docstring says: a condition on the rows of a table.
LOST = {"0002": {"runs": "branch > 0"}}


@contextlib.contextmanager
def fresh(postgres, name):
    with postgres.admin.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    yield postgres.url.set(database=name)
    with postgres.admin.connect() as connection:
        connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))


@pytest.fixture
def empty_url(postgres):
    with fresh(postgres, "migrations") as url:
        yield url


@contextlib.contextmanager
def connected(url):
    engine = create_engine(url)
    try:
        with engine.begin() as connection:
            yield connection
    finally:
        engine.dispose()


def sample(revision):
    path = SAMPLES / f"{revision}.backup"
    works = "run `python -m tests.service.operations.make_sample` and add the file that it makes"
    assert path.exists(), f"revision {revision} has no sample of its data; {works}"
    return path


def put(url, revision, optuna_revision=None):
    """Load the sample of a revision into tables of that revision, and return its manifest."""
    with archive.open_backup(sample(revision)) as reader, connected(url) as connection:
        manifest = reader.manifest
        if optuna_revision:
            older = manifest.revisions | {"optuna": optuna_revision}
            manifest = manifest.model_copy(update={"revisions": older})
        load._make_tables(connection, manifest)
        load._fill_tables(connection, reader, lambda *_: None)
    return manifest


def rows(url, tables):
    """Return the sorted rows of these tables, in those of the columns that exist."""
    found = {}
    with connected(url) as connection:
        for schema, name, columns in tables:
            if not inspect(connection).has_table(name, schema):
                continue
            there = {c["name"] for c in inspect(connection).get_columns(name, schema)}
            kept = [column for column in columns if column in there]
            query = f"SELECT {', '.join(kept)} FROM {schema}.{name}"
            # As text: None and JSON cannot be sorted.
            values = [tuple(map(repr, row)) for row in connection.execute(text(query))]
            found[schema, name] = (kept, sorted(values))
    return found


def shape(manifest):
    return [(t.schema_name, t.name, t.columns) for t in manifest.tables]


def tables(url, schema):
    with connected(url) as connection:
        return set(inspect(connection).get_table_names(schema=schema))


def standing(url):
    with connected(url) as connection:
        return {revision.schema: revision.status for revision in read_revisions(connection)}


def test_upgrading_an_empty_database_makes_our_tables_and_optunas_and_none_in_public(empty_url):
    migrations.upgrade_database(empty_url)
    ours = {"studies", "runs", "measurements", "checkpoints", "events", "api_keys"}
    assert tables(empty_url, "warmscale") >= ours | {"alembic_version"}
    assert "trials" in tables(empty_url, "optuna")
    assert tables(empty_url, "public") == set()


def test_eight_upgrades_at_once_are_one(empty_url):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: migrations.upgrade_database(empty_url), range(8)))
    Sampler(db.optuna_url(empty_url)).close()


def test_the_models_and_the_migrations_agree(database_url):
    command.check(migrations.alembic_config(database_url))


@pytest.mark.parametrize("revision", REVISIONS)
def test_an_upgrade_from_any_revision_keeps_every_row_and_the_service_goes_on(
    empty_url, settings, revision
):
    manifest = put(empty_url, revision)
    before = rows(empty_url, shape(manifest))
    assert {name: len(values) for (_, name), (_, values) in before.items()} == {
        table.name: table.num_rows for table in manifest.tables
    }
    migrations.upgrade_database(empty_url)
    # Alembic compares the tables with the models: no difference is left.
    command.check(migrations.alembic_config(empty_url))
    assert rows(empty_url, shape(manifest)) == before
    serve_to_the_end(settings, empty_url)


def serve_to_the_end(settings, url):
    """Read everything through the API, and complete the studies."""
    # The root of the samples' artifacts, in their URIs.
    same_place = settings.model_copy(update={"artifacts": "s3://bucket/all"})
    with serve_api(same_place, url) as api:
        assert api.client.get("/readyz") == {"status": "ready"}
        studies = api.client.get("/v1/studies")["items"]
        for study in studies:
            for part in ("", "/results", "/trials"):
                api.client.get(f"/v1/studies/{study['id']}{part}")
            headers = {"Authorization": f"Bearer {api.key}"}
            page = httpx.get(f"{api.url}/v1/studies/{study['id']}/report", headers=headers)
            assert page.status_code == 200
        assert {s["state"] for s in studies} == {
            "active", "paused", "completed", "cancelled", "failed",
        }  # fmt: skip
        end_all(api)


def end_all(api):
    """Let every lease expire; then lease and complete runs until no run is left."""
    with api.sessions.begin() as session:
        session.execute(
            text("UPDATE warmscale.runs SET lease_expires_at = now() - interval '1 hour'")
        )
    worker = Worker(api.client)
    # The service was away when these leases expired, so it extends each lease once (decision 0008).
    worker.lease(1)
    with api.sessions.begin() as session:
        session.execute(
            text(
                "UPDATE warmscale.runs SET lease_expires_at = now() - interval '1 hour', "
                "available_at = now() WHERE state = 'leased'"
            )
        )
    for _ in range(40):
        # A failed run waits for its retry; make it due.
        with api.sessions.begin() as session:
            session.execute(text("UPDATE warmscale.runs SET available_at = now()"))
        leases = worker.lease(8)
        if not leases:
            break
        for lease in leases:
            # A trunk publishes a checkpoint at each branch, from which a branch starts.
            if lease.spec.branches:
                for step in lease.spec.branch_steps:
                    worker.publish(lease, step, final=False)
            worker.complete(lease, 1.75)
    states = {s["name"]: s["state"] for s in api.client.get("/v1/studies")["items"]}
    assert states["active"] == "completed"
    assert states["paused"] == "paused"
    assert states.get("budgets", "completed") == "completed"


@pytest.mark.parametrize("revision", REVISIONS)
def test_a_downgrade_says_what_is_lost_and_up_again_nothing_else_is(empty_url, revision):
    manifest = put(empty_url, HEAD)
    before_names = REVISIONS[: REVISIONS.index(revision)]
    to = before_names[-1] if before_names else "base"
    migrations.upgrade_database(empty_url)
    for name, condition in LOST.get(revision, {}).items():
        with connected(empty_url) as connection:
            gone = connection.execute(text(f"DELETE FROM warmscale.{name} WHERE {condition}"))
            assert gone.rowcount > 0
    command.downgrade(migrations.alembic_config(empty_url), to)
    kept = rows(empty_url, shape(manifest)) if before_names else None
    loss = python.getdoc(list_scripts()[len(before_names)].module.downgrade)
    assert loss
    migrations.upgrade_database(empty_url)
    command.check(migrations.alembic_config(empty_url))
    if kept is not None:
        columns = [(schema, name, columns) for (schema, name), (columns, _) in kept.items()]
        assert rows(empty_url, columns) == kept


@pytest.mark.parametrize("older", ["v2.6.0.a", "v3.0.0.d"])
def test_an_older_schema_of_optunas_is_upgraded_with_ours_and_its_trials_stay(
    empty_url, settings, older
):
    manifest = put_older_optuna(empty_url, older)
    trials = [t for t in shape(manifest) if t[:2] == ("optuna", "trial_params")]
    before = rows(empty_url, trials)
    assert standing(empty_url)["optuna"] == "older"
    migrations.upgrade_database(empty_url)
    assert rows(empty_url, trials) == before
    serve_to_the_end(settings, empty_url)


def put_older_optuna(url, older):
    """Load the newest sample, with Optuna's rows in tables of an older Optuna."""
    manifest = put(url, HEAD)
    with connected(url) as connection:
        held = {t.name: t for t in catalog.list_tables(connection) if t.schema == "optuna"}
        sequences = [
            s
            for s in catalog.list_sequences(connection)
            if s.schema_name == "optuna" and s.is_called
        ]
        saved = {
            name: connection.execute(text(f"SELECT * FROM optuna.{name}")).mappings().all()
            for name in held
        }
        connection.execute(text("DROP SCHEMA optuna CASCADE; CREATE SCHEMA optuna"))
        optuna_schema.create_tables(connection, older)
        for key in catalog.list_foreign_keys(connection):
            if key.schema == "optuna":
                drop = f"ALTER TABLE optuna.{key.table} DROP CONSTRAINT {key.name}"
                connection.execute(text(drop))
        for name, held_rows in saved.items():
            if held_rows:
                refill(connection, name, held_rows)
        for sequence in sequences:
            setval = f"SELECT setval('optuna.{sequence.name}', {sequence.last_value})"
            connection.execute(text(setval))
    return manifest


def refill(connection, name, rows):
    there = {c["name"] for c in inspect(connection).get_columns(name, "optuna")}
    for row in rows:
        # The older tables could not hold infinite values, which have no number in this column.
        if row.get("intermediate_value", 0) is None:
            continue
        given = {k: v for k, v in row.items() if k in there}
        columns, values = ", ".join(given), ", ".join(f":{k}" for k in given)
        statement = f"INSERT INTO optuna.{name} ({columns}) VALUES ({values})"
        connection.execute(text(statement), given)


def pretend(url, schema, revision):
    with connected(url) as connection:
        connection.execute(text(f"UPDATE {schema}.alembic_version SET version_num = '{revision}'"))


@pytest.mark.parametrize(("schema", "later"), [("warmscale", "9999"), ("optuna", "v99.0.0.a")])
def test_a_database_of_a_later_version_is_refused_by_name_and_left_alone(
    database_url, schema, later
):
    pretend(database_url, schema, later)
    with pytest.raises(NewerDatabaseError, match=f"{schema} is at {later}, this version works"):
        migrations.upgrade_database(database_url)
    assert standing(database_url)[schema] == "newer"


def test_a_service_on_another_revision_is_not_ready_and_says_which(api, database_url):
    assert httpx.get(f"{api.url}/readyz").status_code == 200
    for schema, revision in (("warmscale", REVISIONS[0]), ("optuna", "v99.0.0.a")):
        pretend(database_url, schema, revision)
        answer = httpx.get(f"{api.url}/readyz")
        assert (answer.status_code, answer.json()["type"]) == (503, "urn:warmscale:needs-upgrade")
        assert f"{schema} is at {revision}" in answer.json()["detail"]


def test_a_service_without_its_tables_is_not_ready(api, database_url):
    with connected(database_url) as connection:
        connection.execute(text("ALTER SCHEMA warmscale RENAME TO aside"))
    answer = httpx.get(f"{api.url}/readyz")
    assert answer.json()["type"] == "urn:warmscale:needs-upgrade"
    with connected(database_url) as connection:
        connection.execute(text("ALTER SCHEMA aside RENAME TO warmscale"))


def test_what_a_missing_column_breaks_is_tried_again_and_not_a_fault_of_the_worker(
    api, database_url
):
    with connected(database_url) as connection:
        connection.execute(text("ALTER TABLE warmscale.studies RENAME COLUMN spec TO another"))
    headers = {"Authorization": f"Bearer {api.key}"}
    answer = httpx.get(f"{api.url}/v1/studies", headers=headers)
    assert (answer.status_code, answer.json()["type"]) == (503, "urn:warmscale:needs-upgrade")
    assert answer.headers["Retry-After"]
    with connected(database_url) as connection:
        connection.execute(text("ALTER TABLE warmscale.studies RENAME COLUMN another TO spec"))


def test_an_upgrade_gives_way_to_a_long_transaction_and_goes_through_after_it(empty_url, caplog):
    put(empty_url, REVISIONS[0])
    holder = create_engine(empty_url)
    with holder.connect() as held:
        # An open transaction that has read `runs`, as of a slow report, keeps a lock on it.
        held.execute(text("SELECT count(*) FROM warmscale.runs"))
        upgrade = threading.Thread(
            target=migrations.upgrade_database,
            args=(empty_url, Patience(lock_seconds=0.2, pause_seconds=0.1, attempts=1000)),
        )
        with caplog.at_level(logging.WARNING):
            upgrade.start()
            while "a table is locked" not in caplog.text:
                time.sleep(0.01)
        # Between two attempts of the migration, other queries of the table get through.
        with connected(empty_url) as other:
            assert other.execute(text("SELECT count(*) FROM warmscale.runs")).scalar() > 0
        assert upgrade.is_alive()
    upgrade.join(30)
    holder.dispose()
    assert standing(empty_url)["warmscale"] == "ready"
    # The warning names the query of the transaction that held the lock.
    assert "SELECT count(*) FROM warmscale.runs" in caplog.text


def test_an_upgrade_that_never_gets_its_lock_changes_nothing_and_says_who_has_it(empty_url):
    put(empty_url, REVISIONS[0])
    holder = create_engine(empty_url)
    with holder.connect() as held:
        pid = held.execute(text("SELECT pg_backend_pid() FROM warmscale.runs LIMIT 1")).scalar()
        with pytest.raises(LockBusyError, match=f"nothing was changed.*pid {pid} "):
            migrations.upgrade_database(
                empty_url, Patience(lock_seconds=0.05, pause_seconds=0.01, attempts=2)
            )
        assert standing(empty_url)["warmscale"] == "older"
    holder.dispose()


def warmscale(monkeypatch, url, *arguments):
    monkeypatch.setenv("WARMSCALE_DATABASE_URL", url.render_as_string(hide_password=False))
    return runner.invoke(app, list(arguments))


def test_the_command_line_says_where_a_database_stands(monkeypatch, database_url, empty_url):
    at_head = warmscale(monkeypatch, database_url, "db", "current", "--json")
    assert (at_head.exit_code, f'"found": "{HEAD}"' in at_head.stdout) == (0, True)
    empty = warmscale(monkeypatch, empty_url, "db", "current")
    assert (empty.exit_code, "run `warmscale db upgrade`" in empty.stderr) == (4, True)
    known = runner.invoke(app, ["db", "history"]).stdout.splitlines()
    assert [line.split()[0] for line in known] == REVISIONS


def test_serving_an_empty_or_older_database_is_refused_before_it_listens(empty_url, capsys):
    for state in ("has no tables", f"is at {REVISIONS[0]}"):
        with pytest.raises(typer.Exit) as refused:
            serve._prepare_database(empty_url, upgraded=False)
        assert (refused.value.exit_code, state in capsys.readouterr().err) == (4, True)
        put(empty_url, REVISIONS[0])


def test_a_downgrade_is_asked_for_twice_and_names_what_it_loses(monkeypatch, empty_url):
    put(empty_url, HEAD)
    migrations.upgrade_database(empty_url)
    first = warmscale(monkeypatch, empty_url, "db", "downgrade", "--to", "0001")
    assert (first.exit_code, "Delete branches" in first.stderr) == (2, True)
    assert standing(empty_url)["warmscale"] == "ready"
    second = warmscale(monkeypatch, empty_url, "db", "downgrade", "--to", "0001", "--yes")
    assert (second.exit_code, standing(empty_url)["warmscale"]) == (0, "older")
    beyond = warmscale(monkeypatch, empty_url, "db", "downgrade", "--to", HEAD, "--yes")
    assert (beyond.exit_code, "below it is none" in beyond.stderr) == (2, True)


def test_a_later_database_ends_the_command_in_a_sentence(monkeypatch, database_url):
    pretend(database_url, "warmscale", "9999")
    refused = warmscale(monkeypatch, database_url, "db", "upgrade")
    assert (refused.exit_code, "is at 9999" in refused.stderr) == (4, True)
    assert "Traceback" not in refused.stderr


@pytest.mark.parametrize("url", ["sqlite:///x.db", "mysql://h/d"])
def test_another_database_is_refused_by_name(url):
    with pytest.raises(ValueError, match="must be a postgresql"):
        db.normalize_url(url)
