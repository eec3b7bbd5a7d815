"""Migrations: empty to head, down and up again, and nothing that the models have is missing."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from alembic import command
from sqlalchemy import create_engine, inspect, text

from service import db
from service.sampler import Sampler


@pytest.fixture
def empty_url(postgres):
    with postgres.admin.connect() as connection:
        connection.execute(text("CREATE DATABASE migrations"))
    yield postgres.url.set(database="migrations")
    with postgres.admin.connect() as connection:
        connection.execute(text("DROP DATABASE migrations WITH (FORCE)"))


def tables(url, schema):
    engine = create_engine(url)
    names = set(inspect(engine).get_table_names(schema=schema))
    engine.dispose()
    return names


def test_upgrading_an_empty_database_makes_our_tables_and_optunas_and_none_in_public(empty_url):
    db.upgrade(empty_url)
    ours = {"studies", "runs", "measurements", "checkpoints", "events", "api_keys", "launches"}
    assert tables(empty_url, "warmscale") == ours | {"alembic_version"}
    assert "trials" in tables(empty_url, "optuna")
    assert tables(empty_url, "public") == set()


def test_eight_upgrades_at_once_are_one(empty_url):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: db.upgrade(empty_url), range(8)))
    Sampler(db.optuna_url(empty_url)).close()


def test_the_models_and_the_migrations_agree(database_url):
    command.check(db.alembic_config(database_url))


def test_every_revision_goes_down_and_up_again(database_url):
    config = db.alembic_config(database_url)
    command.downgrade(config, "base")
    assert tables(database_url, "warmscale") == {"alembic_version"}
    command.upgrade(config, "head")
    command.check(config)


@pytest.mark.parametrize("url", ["sqlite:///x.db", "mysql://h/d"])
def test_another_database_is_refused_by_name(url):
    with pytest.raises(ValueError, match="must be a postgresql"):
        db.normalized(url)
