"""Restores a backup, in one transaction: afterwards all of it is there, or nothing has changed."""

from collections.abc import Callable
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
from service.operations.backup.catalog import SCHEMAS, TableShape
from service.operations.backup.dump import TEXT_FORMAT
from service.operations.migrations import config_for_connection, hold_tables, known_revisions
from service.operations.revisions import Revision, check_not_newer
from service.optuna_bridge import schema as optuna_schema

APPLICATION = "warmscale restore"
Progress = Callable[[str, int], None]


class NotEmptyError(Exception):
    """There is something where a backup was to be restored."""


class InUseError(Exception):
    """Somebody else is connected to the database."""


def restore_backup(url: URL, path: Path, progress: Progress, *, replace: bool) -> BackupManifest:
    """Restore the backup at `path`, and upgrade what it holds to this version.

    Raises:
        BackupError: the file is no backup, is damaged, or is of a later version.
        NotEmptyError: the database holds something and `replace` was not said.
        InUseError: a service, or somebody, is connected.
    """
    named = url.update_query_dict({"application_name": APPLICATION})
    with open_backup(path) as reader, hold_tables(named):
        check_not_newer(_revisions(reader.manifest))
        reader.check(lambda size: progress("checking", size))
        engine = create_engine(named, poolclass=NullPool)
        with engine.begin() as connection:
            _refuse_others(connection)
            if not replace:
                _refuse_rows(connection)
            connection.execute(text(TEXT_FORMAT))
            _make_tables(connection, reader.manifest)
            _fill_tables(connection, reader, progress)
            _settle_events(connection)
            _upgrade(connection)
        with engine.begin() as connection:
            connection.execute(text("ANALYZE"))
    return reader.manifest


def _revisions(manifest: BackupManifest) -> tuple[Revision, ...]:
    if set(manifest.revisions) != set(SCHEMAS):
        raise BackupError(f"the backup is of schemas {', '.join(manifest.revisions)}")
    known = known_revisions()
    return tuple(
        Revision(schema=schema, found=manifest.revisions[schema], known=known[schema])
        for schema in SCHEMAS
    )


def _refuse_others(connection: Connection) -> None:
    """A service that goes on would serve what it remembers of the database that was there."""
    if found := catalog.list_other_connections(connection):
        raise InUseError(
            f"stop the service first: {len(found)} other connections to this database "
            f"({'; '.join(found[:5])})"
        )


def _refuse_rows(connection: Connection) -> None:
    counts = {
        f"{t.schema}.{t.name}": catalog.count_rows(connection, t) for t in _tables(connection)
    }
    if held := [f"{count} in {name}" for name, count in counts.items() if count]:
        raise NotEmptyError(
            f"the database is not empty ({', '.join(held)} rows); --replace deletes all of it"
        )


def _tables(connection: Connection) -> list[TableShape]:
    """All but the one that Optuna fills when it makes its tables."""
    return [t for t in catalog.list_tables(connection) if t.name != "version_info"]


def _make_tables(connection: Connection, manifest: BackupManifest) -> None:
    for schema in SCHEMAS:
        connection.execute(text(f"DROP SCHEMA IF EXISTS {schema} CASCADE"))
        connection.execute(text(f"CREATE SCHEMA {schema}"))
    command.upgrade(config_for_connection(connection), manifest.revisions[SCHEMA])
    optuna_schema.create(connection, manifest.revisions[OPTUNA_SCHEMA])
    connection.execute(text("SET LOCAL search_path TO DEFAULT"))


def _fill_tables(connection: Connection, reader: BackupReader, progress: Progress) -> None:
    """Rows go in without foreign keys, which may be circular; making those again checks them."""
    shapes = {(t.schema, t.name): t for t in catalog.list_tables(connection)}
    keys = catalog.list_foreign_keys(connection)
    for key in keys:
        _do(connection, "ALTER TABLE {} DROP CONSTRAINT {}", (key.schema, key.table), (key.name,))
    for shape in shapes.values():
        _do(connection, "DELETE FROM {}", (shape.schema, shape.name))  # what migrations put there
    for table in reader.manifest.tables:
        shape = shapes.get((table.schema_name, table.name))
        if shape is None or not set(table.columns) <= set(shape.columns):
            raise BackupError(f"{table.member} is of no table that its revision has")
        _copy(connection, reader, table, progress)
    for key in keys:
        table = sql.Identifier(key.schema, key.table)
        add = sql.SQL("ALTER TABLE {} ADD CONSTRAINT {} ").format(table, sql.Identifier(key.name))
        connection.exec_driver_sql(add.as_string() + key.definition)
    for sequence in reader.manifest.sequences:
        name = sql.Identifier(sequence.schema_name, sequence.name).as_string()
        connection.execute(
            text("SELECT setval(CAST(:name AS regclass), :last, :called)"),
            {"name": name, "last": sequence.last_value, "called": sequence.is_called},
        )


def _copy(
    connection: Connection, reader: BackupReader, table: BackupTable, progress: Progress
) -> None:
    name = sql.Identifier(table.schema_name, table.name)
    columns = sql.SQL(", ").join(map(sql.Identifier, table.columns))
    driver = connection.connection.driver_connection
    assert driver is not None
    with driver.cursor() as cursor:
        with cursor.copy(sql.SQL("COPY {} ({}) FROM STDIN").format(name, columns)) as copy:
            for piece in reader.rows(table):
                copy.write(piece)
                progress(f"{table.schema_name}.{table.name}", len(piece))
        if cursor.rowcount != table.num_rows:
            raise BackupError(
                f"{table.member} gave {cursor.rowcount} rows, its manifest says {table.num_rows}"
            )


def _do(connection: Connection, statement: str, *names: tuple[str, ...]) -> None:
    identifiers = [sql.Identifier(*name) for name in names]
    connection.exec_driver_sql(sql.SQL(statement).format(*identifiers).as_string())  # pyright: ignore[reportArgumentType]


def _settle_events(connection: Connection) -> None:
    """Have the events of a server that was ahead of this one read as the past that they are.

    Streams show transactions below those that still run (decision 0011). On a younger server the
    numbers in the backup lie in its future, and its own new ones below them.
    """
    ahead = "SELECT max(xid) >= (pg_current_xact_id()::text)::bigint FROM warmscale.events"
    if connection.execute(text(ahead)).scalar():
        for statement in (
            "ALTER TABLE warmscale.events DISABLE TRIGGER USER",  # which keeps them append-only
            "UPDATE warmscale.events SET xid = 0",
            "ALTER TABLE warmscale.events ENABLE TRIGGER USER",
        ):
            connection.execute(text(statement))


def _upgrade(connection: Connection) -> None:
    command.upgrade(config_for_connection(connection), "head")
    optuna_schema.migrate(connection, optuna_schema.revisions()[-1])
