"""The tables, keys and sequences to copy, from PostgreSQL's catalog: a new table needs no entry."""

from dataclasses import dataclass

from psycopg import sql
from sqlalchemy import Connection, text

from service.database.tables import OPTUNA_SCHEMA, SCHEMA
from service.operations.backup.archive import BackupSequence

SCHEMAS = (SCHEMA, OPTUNA_SCHEMA)
_VERSION_TABLE = "alembic_version"  # a restore writes it from the revision in the manifest


@dataclass(frozen=True, kw_only=True)
class TableShape:
    """A table with its stored columns, generated ones left out, and its primary key."""

    schema: str
    name: str
    columns: tuple[str, ...]
    key: tuple[str, ...]

    @property
    def identifier(self) -> sql.Identifier:
        """Name of the table in SQL."""
        return sql.Identifier(self.schema, self.name)


@dataclass(frozen=True, kw_only=True)
class ForeignKey:
    """A foreign key, with the SQL that makes it again."""

    schema: str
    table: str
    name: str
    definition: str


def list_tables(connection: Connection) -> tuple[TableShape, ...]:
    """Return every table of both schemas, except the tables of the revisions."""
    rows = connection.execute(text(_TABLES), {"schemas": list(SCHEMAS), "not": _VERSION_TABLE})
    return tuple(
        TableShape(schema=schema, name=name, columns=tuple(columns), key=tuple(key))
        for schema, name, columns, key in rows
    )


def list_foreign_keys(connection: Connection) -> tuple[ForeignKey, ...]:
    """Return every foreign key of both schemas."""
    rows = connection.execute(text(_FOREIGN_KEYS), {"schemas": list(SCHEMAS)})
    return tuple(ForeignKey(schema=s, table=t, name=n, definition=d) for s, t, n, d in rows)


def list_sequences(connection: Connection) -> tuple[BackupSequence, ...]:
    """Return every sequence of both schemas with its last number."""
    rows = connection.execute(text(_SEQUENCES), {"schemas": list(SCHEMAS)})
    return tuple(
        BackupSequence(
            schema_name=schema, name=name, last_value=last or first, is_called=bool(last)
        )
        for schema, name, last, first in rows
    )


def count_rows(connection: Connection, table: TableShape) -> int:
    """Return the number of rows of a table."""
    query = sql.SQL("SELECT count(*) FROM {}").format(table.identifier)
    return connection.exec_driver_sql(query.as_string()).scalar_one()


def list_other_connections(connection: Connection) -> list[str]:
    """Return the other connections to this database, without those of a restore."""
    return list(connection.execute(text(_OTHERS)).scalars())


# The columns come in their order in the table, without dropped and generated ones. The columns of
# the primary key come in the order of the key: `k.at` is the place of a column in its index.
_TABLES = """
    SELECT n.nspname, c.relname,
        (SELECT array_agg(a.attname::text ORDER BY a.attnum) FROM pg_attribute a
          WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated = ''),
        coalesce((SELECT array_agg(a.attname::text ORDER BY k.at)
           FROM pg_index i, unnest(i.indkey::int2[]) WITH ORDINALITY AS k (num, at), pg_attribute a
          WHERE i.indrelid = c.oid AND i.indisprimary
            AND a.attrelid = c.oid AND a.attnum = k.num), '{}')
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE c.relkind = 'r' AND n.nspname = ANY(:schemas) AND c.relname <> :not
    ORDER BY 1, 2
"""

_FOREIGN_KEYS = """
    SELECT n.nspname, c.relname, f.conname, pg_get_constraintdef(f.oid)
    FROM pg_constraint f
    JOIN pg_class c ON c.oid = f.conrelid JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE f.contype = 'f' AND n.nspname = ANY(:schemas)
    ORDER BY 1, 2, 3
"""

# `last_value` is NULL for a sequence that has given out no number: it begins with `start_value`.
_SEQUENCES = """
    SELECT schemaname, sequencename, last_value, start_value
    FROM pg_sequences WHERE schemaname = ANY(:schemas) ORDER BY 1, 2
"""

# The connections of a restore have the application name `warmscale restore`.
_OTHERS = """
    SELECT format('pid %s %s%s', pid, coalesce(nullif(application_name, ''), usename),
                  coalesce(' from ' || host(client_addr), ''))
    FROM pg_stat_activity
    WHERE datname = current_database() AND backend_type = 'client backend'
      AND pid <> pg_backend_pid() AND application_name <> 'warmscale restore'
    ORDER BY backend_start
"""
