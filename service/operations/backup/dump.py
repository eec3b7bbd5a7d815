"""Writes a backup: every table of both schemas as of one moment, while the service runs."""

from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from psycopg import sql
from sqlalchemy import Connection, create_engine, text
from sqlalchemy.engine import URL
from sqlalchemy.pool import NullPool

from service import __version__
from service.operations.backup import catalog
from service.operations.backup.archive import (
    BackupError,
    BackupManifest,
    BackupWriter,
    create_backup,
)
from service.operations.backup.catalog import TableShape
from service.operations.migrations import hold_tables, read_revisions

# So that the text means the same on every server, whatever its or the user's settings are.
TEXT_FORMAT = """
    SET LOCAL datestyle = 'ISO'; SET LOCAL timezone = 'UTC'; SET LOCAL intervalstyle = 'postgres';
    SET LOCAL extra_float_digits = 1; SET LOCAL bytea_output = 'hex';
    SET LOCAL client_encoding = 'UTF8'; SET LOCAL statement_timeout = 0
"""

Progress = Callable[[str, int], None]


def write_backup(url: URL, path: Path, progress: Progress) -> BackupManifest:
    """Write a backup to `path`; `progress` hears of rows as table and bytes.

    Migrations wait until it is done. Nobody else does.

    Raises:
        BackupError: `path` cannot be written, or there is nothing to back up.
    """
    with hold_tables(url, shared=True), create_backup(path) as writer:
        engine = create_engine(
            url,
            poolclass=NullPool,
            isolation_level="REPEATABLE READ",
            execution_options={"postgresql_readonly": True},
        )
        with engine.begin() as connection:
            connection.execute(text(TEXT_FORMAT))
            manifest = _all(connection, writer, progress)
        writer.manifest(manifest)
    return manifest


def _all(connection: Connection, writer: BackupWriter, progress: Progress) -> BackupManifest:
    found = {one.schema: one.found for one in read_revisions(connection)}
    if None in found.values():
        raise BackupError("the database has no tables yet; there is nothing to back up")
    shapes = catalog.list_tables(connection)
    return BackupManifest(
        made_at=datetime.now(UTC),
        warmscale=__version__,
        postgresql=connection.execute(text("SHOW server_version")).scalar_one(),
        revisions={schema: revision for schema, revision in found.items() if revision},
        tables=tuple(
            writer.table(s.schema, s.name, s.columns, _rows(connection, s, progress))
            for s in shapes
        ),
        # Sequences follow no snapshot: read last, they are never behind the rows.
        sequences=catalog.list_sequences(connection),
    )


def _rows(connection: Connection, table: TableShape, progress: Progress) -> Iterator[bytes]:
    """In the order of the primary key, so that equal databases give equal bytes."""
    query = sql.SQL("COPY (SELECT {} FROM {} ORDER BY {}) TO STDOUT").format(
        _names(table.columns), table.identifier, _names(table.key or table.columns)
    )
    driver = connection.connection.driver_connection
    assert driver is not None
    with driver.cursor() as cursor, cursor.copy(query) as copy:
        for piece in copy:
            progress(f"{table.schema}.{table.name}", len(piece))
            yield bytes(piece)


def _names(columns: tuple[str, ...]) -> sql.Composed:
    return sql.SQL(", ").join(map(sql.Identifier, columns))
