"""The writing of a backup: every table of both schemas at one moment, while the service runs."""

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

# With these settings COPY writes the same text on every server. For example a server with another
# datestyle would write 12/31/2026, which PostgreSQL elsewhere may read as an error or as a date in
# another month.
TEXT_FORMAT = """
    SET LOCAL datestyle = 'ISO'; SET LOCAL timezone = 'UTC'; SET LOCAL intervalstyle = 'postgres';
    SET LOCAL extra_float_digits = 1; SET LOCAL bytea_output = 'hex';
    SET LOCAL client_encoding = 'UTF8'; SET LOCAL statement_timeout = 0
"""

Progress = Callable[[str, int], None]


def write_backup(url: URL, path: Path, progress: Progress) -> BackupManifest:
    """Write a backup to `path`; call `progress` with the table's name and a number of bytes.

    Migrations and restores wait until the backup is done. The service goes on.

    Raises:
        BackupError: `path` cannot be written, or the database has no tables.
    """
    with hold_tables(url, shared=True), create_backup(path) as writer:
        # REPEATABLE READ: every table is read at the moment of the first query.
        engine = create_engine(
            url,
            poolclass=NullPool,
            isolation_level="REPEATABLE READ",
            execution_options={"postgresql_readonly": True},
        )
        with engine.begin() as connection:
            connection.execute(text(TEXT_FORMAT))
            manifest = _dump_tables(connection, writer, progress)
        writer.write_manifest(manifest)
    return manifest


def _dump_tables(
    connection: Connection, writer: BackupWriter, progress: Progress
) -> BackupManifest:
    found = {revision.schema: revision.found for revision in read_revisions(connection)}
    if None in found.values():
        raise BackupError("the database has no tables yet; there is nothing to back up")
    shapes = catalog.list_tables(connection)
    return BackupManifest(
        made_at=datetime.now(UTC),
        warmscale=__version__,
        postgresql=connection.execute(text("SHOW server_version")).scalar_one(),
        revisions={schema: revision for schema, revision in found.items() if revision},
        tables=tuple(
            writer.write_table(s.schema, s.name, s.columns, _copy_rows(connection, s, progress))
            for s in shapes
        ),
        # A sequence follows no snapshot: it shows its newest number at once. Read after the tables,
        # it may be ahead of the rows, 105 with rows up to 100, but never behind them.
        sequences=catalog.list_sequences(connection),
    )


# COPY reads in the order of the primary key, not of the disk. PostgreSQL moves a row when it is
# updated: of two databases with the rows (1, a) and (2, b), one may store (2, b) first. Ordered by
# key, equal databases give equal bytes, and the hashes in two manifests can be compared.
def _copy_rows(connection: Connection, table: TableShape, progress: Progress) -> Iterator[bytes]:
    """Yield a table's rows as COPY text, in the order of the primary key."""
    query = sql.SQL("COPY (SELECT {} FROM {} ORDER BY {}) TO STDOUT").format(
        _join_names(table.columns), table.identifier, _join_names(table.key or table.columns)
    )
    driver = connection.connection.driver_connection
    assert driver is not None
    with driver.cursor() as cursor, cursor.copy(query) as copy:
        for piece in copy:
            progress(f"{table.schema}.{table.name}", len(piece))
            yield bytes(piece)


def _join_names(columns: tuple[str, ...]) -> sql.Composed:
    return sql.SQL(", ").join(map(sql.Identifier, columns))
