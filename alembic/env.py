"""Alembic's environment: our tables, in our schema, where the caller says."""

from alembic import context
from sqlalchemy import Connection

from service.database.tables import SCHEMA, Base
from service.operations.migrations import create_locking_engine


def run(connection: Connection) -> None:
    """Run what was asked for; a transaction that is open already is left open."""
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        version_table_schema=SCHEMA,
        include_schemas=True,
        include_name=lambda name, kind, _: kind != "schema" or name == SCHEMA,
        compare_server_default=True,
    )
    with context.begin_transaction():
        context.run_migrations()


given = context.config.attributes
if "connection" in given:
    run(given["connection"])
else:
    engine = create_locking_engine(given["url"], given["lock_seconds"])
    with engine.connect() as connection:
        run(connection)
