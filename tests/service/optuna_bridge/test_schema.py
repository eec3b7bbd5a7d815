"""An Optuna with unknown tables: the service refuses it before any write."""

import builtins
import importlib
import sys

import pytest
import typer
from optuna.storages import RDBStorage
from sqlalchemy import create_engine, inspect, text
from typer.testing import CliRunner

from service.cli import serve
from service.cli.main import app
from service.operations import migrations
from service.optuna_bridge import schema
from service.optuna_bridge.installed_optuna import (
    KNOWN_COLUMNS,
    KNOWN_REVISION,
    UnknownOptunaError,
)
from service.optuna_bridge.sampler import Sampler

WORKS = r"pip install 'optuna==5\.0\.\*'"


@pytest.fixture
def forget_checks():
    """Clear the caches, so that the checks run again as in a new process."""
    caches = (schema.check_installed_optuna, migrations.known_revisions)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.fixture
def unknown_optuna(forget_checks, monkeypatch):
    monkeypatch.setattr(schema, "KNOWN_REVISION", "v9.0.0.a")


@pytest.fixture
def emptied_url(postgres):
    with postgres.admin.connect() as connection:
        connection.execute(text("CREATE DATABASE unknown_optuna"))
    yield postgres.url.set(database="unknown_optuna")
    with postgres.admin.connect() as connection:
        connection.execute(text("DROP DATABASE unknown_optuna WITH (FORCE)"))


def test_the_installed_optuna_makes_the_known_tables(forget_checks):
    schema.check_installed_optuna()
    storage = RDBStorage("sqlite://")
    assert storage.get_head_version() == KNOWN_REVISION
    for table, columns in KNOWN_COLUMNS.items():
        assert {c["name"] for c in inspect(storage.engine).get_columns(table)} == columns
    storage.engine.dispose()


def test_another_revision_of_the_tables_is_refused_by_name(unknown_optuna):
    with pytest.raises(UnknownOptunaError, match=f"revision {KNOWN_REVISION}.*{WORKS}"):
        Sampler("postgresql+psycopg://nowhere/none")


def test_a_new_column_without_a_new_revision_is_refused_by_name(forget_checks, monkeypatch):
    # As if the installed Optuna had the new column `state`.
    known = KNOWN_COLUMNS | {"trials": KNOWN_COLUMNS["trials"] - {"state"}}
    monkeypatch.setattr(schema, "KNOWN_COLUMNS", known)
    with pytest.raises(UnknownOptunaError, match=f"table trials has the columns .*{WORKS}"):
        schema.check_installed_optuna()


def test_an_optuna_that_moved_its_tables_definition_is_refused_by_name(monkeypatch):
    load = builtins.__import__

    # The module may move in a later Optuna: then the import of its old name fails.
    def import_moved(name, *rest):
        if name == "optuna.storages._rdb":
            raise ImportError(name=name)
        return load(name, *rest)

    monkeypatch.delitem(sys.modules, "service.optuna_bridge.schema")
    monkeypatch.setattr(builtins, "__import__", import_moved)
    with pytest.raises(UnknownOptunaError, match=f"it has no optuna.storages._rdb.*{WORKS}"):
        importlib.import_module("service.optuna_bridge.schema")


def test_an_upgrade_with_an_unknown_optuna_changes_nothing(
    unknown_optuna, emptied_url, monkeypatch
):
    monkeypatch.setenv("WARMSCALE_DATABASE_URL", emptied_url.render_as_string(hide_password=False))
    refused = CliRunner().invoke(app, ["db", "upgrade"])
    assert (refused.exit_code, "pip install 'optuna==5.0.*'" in refused.stderr) == (4, True)
    assert "Traceback" not in refused.stderr
    engine = create_engine(emptied_url)
    assert not {"warmscale", "optuna"} & set(inspect(engine).get_schema_names())
    engine.dispose()


@pytest.mark.parametrize("upgraded", [False, True])
def test_serving_with_an_unknown_optuna_is_refused_before_it_listens(
    unknown_optuna, database_url, upgraded, capsys
):
    with pytest.raises(typer.Exit) as refused:
        serve._prepare_database(database_url, upgraded=upgraded)
    assert refused.value.exit_code == 4
    assert "pip install 'optuna==5.0.*'" in capsys.readouterr().err
