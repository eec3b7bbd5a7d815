"""The restoring of a backup in one transaction: afterwards all of it is there, or nothing."""

from collections.abc import Iterable
from pathlib import Path

from alembic import command
from psycopg import sql
from sqlalchemy import Connection, create_engine, text
from sqlalchemy.engine import URL
from sqlalchemy.pool import NullPool

from service.database.tables import OPTUNA_SCHEMA, SCHEMA
from service.operations.backup import catalog
from service.operations.backup.archive import (
    BackupError,
    BackupManifest,
    BackupReader,
    BackupTable,
    open_backup,
)
from service.operations.backup.catalog import SCHEMAS, ForeignKey, TableShape
from service.operations.backup.dump import TEXT_FORMAT, Progress
from service.operations.migrations import config_for_connection, hold_tables, known_revisions
from service.operations.revisions import Revision, check_not_newer
from service.optuna_bridge import schema as optuna_schema

APPLICATION = "warmscale restore"


class NotEmptyError(Exception):
    """A database that holds rows already."""


class InUseError(Exception):
    """A database with other connections."""


def restore_backup(url: URL, path: Path, progress: Progress, *, replace: bool) -> BackupManifest:
    """Restore the backup at `path`, and upgrade its tables to this version.

    Raises:
        BackupError: the file is no backup, is damaged, or is of a later version.
        NotEmptyError: the database holds rows and `replace` is false.
        InUseError: a service, or any other program, is connected.
    """
    named = url.update_query_dict({"application_name": APPLICATION})
    with open_backup(path) as reader, hold_tables(named):
        check_not_newer(_read_revisions(reader.manifest))
        reader.check_hashes(lambda size: progress("checking", size))
        engine = create_engine(named, poolclass=NullPool)
        with engine.begin() as connection:
            _refuse_other_connections(connection)
            if not replace:
                _refuse_rows(connection)
            connection.execute(text(TEXT_FORMAT))
            _make_tables(connection, reader.manifest)
            _fill_tables(connection, reader, progress)
            _settle_events(connection)
            _upgrade_schemas(connection)
        with engine.begin() as connection:
            connection.execute(text("ANALYZE"))
    return reader.manifest


def _read_revisions(manifest: BackupManifest) -> tuple[Revision, ...]:
    if set(manifest.revisions) != set(SCHEMAS):
        raise BackupError(f"the backup is of schemas {', '.join(manifest.revisions)}")
    known = known_revisions()
    return tuple(
        Revision(schema=schema, found=manifest.revisions[schema], known=known[schema])
        for schema in SCHEMAS
    )


def _refuse_other_connections(connection: Connection) -> None:
    # A running service caches callers, specs and trials. It would serve those of the old database.
    if found := catalog.list_other_connections(connection):
        raise InUseError(
            f"stop the service first: {len(found)} other connections to this database "
            f"({'; '.join(found[:5])})"
        )


def _refuse_rows(connection: Connection) -> None:
    counts = {
        f"{t.schema}.{t.name}": catalog.count_rows(connection, t)
        for t in _list_user_tables(connection)
    }
    if held := [f"{count} in {name}" for name, count in counts.items() if count]:
        raise NotEmptyError(
            f"the database is not empty ({', '.join(held)} rows); --replace deletes all of it"
        )


def _list_user_tables(connection: Connection) -> list[TableShape]:
    """Return all tables but `version_info`, which Optuna fills when it makes its tables."""
    return [t for t in catalog.list_tables(connection) if t.name != "version_info"]


def _make_tables(connection: Connection, manifest: BackupManifest) -> None:
    for schema in SCHEMAS:
        connection.execute(text(f"DROP SCHEMA IF EXISTS {schema} CASCADE"))
        connection.execute(text(f"CREATE SCHEMA {schema}"))
    command.upgrade(config_for_connection(connection), manifest.revisions[SCHEMA])
    optuna_schema.create_tables(connection, manifest.revisions[OPTUNA_SCHEMA])
    connection.execute(text("SET LOCAL search_path TO DEFAULT"))


def _fill_tables(connection: Connection, reader: BackupReader, progress: Progress) -> None:
    """Fill the tables with the backup's rows, and set the sequences."""
    shapes = {(t.schema, t.name): t for t in catalog.list_tables(connection)}
    # Rows go in without foreign keys, and the keys are made again at the end, which checks them.
    # With the keys in place no order of tables works: a run refers to a checkpoint as its base, and
    # a checkpoint refers to its run.
    keys = catalog.list_foreign_keys(connection)
    _drop_foreign_keys(connection, keys)
    # The migrations have written rows of their own.
    for shape in shapes.values():
        _run_sql(connection, "DELETE FROM {}", (shape.schema, shape.name))
    for table in reader.manifest.tables:
        shape = shapes.get((table.schema_name, table.name))
        if shape is None or not set(table.columns) <= set(shape.columns):
            raise BackupError(f"{table.member} fits no table of its revision")
        _copy_table(connection, reader, table, progress)
    _add_foreign_keys(connection, keys)
    for sequence in reader.manifest.sequences:
        name = sql.Identifier(sequence.schema_name, sequence.name).as_string()
        connection.execute(
            text("SELECT setval(CAST(:name AS regclass), :last, :called)"),
            {"name": name, "last": sequence.last_value, "called": sequence.is_called},
        )


def _drop_foreign_keys(connection: Connection, keys: Iterable[ForeignKey]) -> None:
    for key in keys:
        drop = "ALTER TABLE {} DROP CONSTRAINT {}"
        _run_sql(connection, drop, (key.schema, key.table), (key.name,))


def _add_foreign_keys(connection: Connection, keys: Iterable[ForeignKey]) -> None:
    for key in keys:
        table = sql.Identifier(key.schema, key.table)
        add = sql.SQL("ALTER TABLE {} ADD CONSTRAINT {} ").format(table, sql.Identifier(key.name))
        connection.exec_driver_sql(add.as_string() + key.definition)


def _copy_table(
    connection: Connection, reader: BackupReader, table: BackupTable, progress: Progress
) -> None:
    name = sql.Identifier(table.schema_name, table.name)
    columns = sql.SQL(", ").join(map(sql.Identifier, table.columns))
    driver = connection.connection.driver_connection
    assert driver is not None
    with driver.cursor() as cursor:
        with cursor.copy(sql.SQL("COPY {} ({}) FROM STDIN").format(name, columns)) as copy:
            for piece in reader.read_rows(table):
                copy.write(piece)
                progress(f"{table.schema_name}.{table.name}", len(piece))
        if cursor.rowcount != table.num_rows:
            raise BackupError(
                f"{table.member} has {cursor.rowcount} rows, its manifest says {table.num_rows}"
            )


def _run_sql(connection: Connection, statement: str, *names: tuple[str, ...]) -> None:
    identifiers = [sql.Identifier(*name) for name in names]
    connection.exec_driver_sql(sql.SQL(statement).format(*identifiers).as_string())  # pyright: ignore[reportArgumentType]


def _settle_events(connection: Connection) -> None:
    """Mark the events as past if they have transaction numbers from the future of this server."""
    # A stream shows an event once all transactions up to its own have ended (decision 0011). For
    # example the backup has events of transaction 1 000 000, and a new server is at 750: a stream
    # would not show those events, and would sort new ones before them.
    ahead = "SELECT max(xid) >= (pg_current_xact_id()::text)::bigint FROM warmscale.events"
    if connection.execute(text(ahead)).scalar():
        for statement in (
            # The trigger refuses every change of an event.
            "ALTER TABLE warmscale.events DISABLE TRIGGER USER",
            "UPDATE warmscale.events SET xid = 0",
            "ALTER TABLE warmscale.events ENABLE TRIGGER USER",
        ):
            connection.execute(text(statement))


def _upgrade_schemas(connection: Connection) -> None:
    command.upgrade(config_for_connection(connection), "head")
    optuna_schema.migrate_tables(connection, optuna_schema.list_revisions()[-1])
