"""What there is to copy, asked of PostgreSQL itself: no table can be forgotten here."""

from dataclasses import dataclass

from psycopg import sql
from sqlalchemy import Connection, text

from service.database.tables import OPTUNA_SCHEMA, SCHEMA
from service.operations.backup.archive import BackupSequence

SCHEMAS = (SCHEMA, OPTUNA_SCHEMA)
_VERSION_TABLE = "alembic_version"  # made anew from the revision in the manifest


@dataclass(frozen=True, kw_only=True)
class TableShape:
    """A table, its columns that are stored, and those of its primary key."""

    schema: str
    name: str
    columns: tuple[str, ...]
    key: tuple[str, ...]

    @property
    def identifier(self) -> sql.Identifier:
        """Its name in SQL."""
        return sql.Identifier(self.schema, self.name)


@dataclass(frozen=True, kw_only=True)
class ForeignKey:
    """A constraint, in the words that make it again."""

    schema: str
    table: str
    name: str
    definition: str


def list_tables(connection: Connection) -> tuple[TableShape, ...]:
    """Every table of both schemas, but those that only say the revision."""
    rows = connection.execute(text(_TABLES), {"schemas": list(SCHEMAS), "not": _VERSION_TABLE})
    return tuple(
        TableShape(schema=schema, name=name, columns=tuple(columns), key=tuple(key))
        for schema, name, columns, key in rows
    )


def list_foreign_keys(connection: Connection) -> tuple[ForeignKey, ...]:
    """Every foreign key of both schemas."""
    rows = connection.execute(text(_FOREIGN_KEYS), {"schemas": list(SCHEMAS)})
    return tuple(ForeignKey(schema=s, table=t, name=n, definition=d) for s, t, n, d in rows)


def list_sequences(connection: Connection) -> tuple[BackupSequence, ...]:
    """Where every sequence of both schemas stands."""
    rows = connection.execute(text(_SEQUENCES), {"schemas": list(SCHEMAS)})
    return tuple(
        BackupSequence(
            schema_name=schema, name=name, last_value=last or first, is_called=bool(last)
        )
        for schema, name, last, first in rows
    )


def count_rows(connection: Connection, table: TableShape) -> int:
    """How many rows it has."""
    query = sql.SQL("SELECT count(*) FROM {}").format(table.identifier)
    return connection.exec_driver_sql(query.as_string()).scalar_one()


def list_other_connections(connection: Connection) -> list[str]:
    """Who else is connected to this database. The caller's own connections are named by it."""
    return list(connection.execute(text(_OTHERS)).scalars())


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

_SEQUENCES = """
    SELECT schemaname, sequencename, last_value, start_value
    FROM pg_sequences WHERE schemaname = ANY(:schemas) ORDER BY 1, 2
"""

_OTHERS = """
    SELECT format('pid %s %s%s', pid, coalesce(nullif(application_name, ''), usename),
                  coalesce(' from ' || host(client_addr), ''))
    FROM pg_stat_activity
    WHERE datname = current_database() AND backend_type = 'client backend'
      AND pid <> pg_backend_pid() AND application_name <> 'warmscale restore'
    ORDER BY backend_start
"""
