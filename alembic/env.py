"""Alembic's environment: it migrates our tables, on the connection or the URL of the caller."""

from alembic import context
from sqlalchemy import Connection

from service.database.tables import SCHEMA, Base
from service.operations.migrations import create_locking_engine


def run_on(connection: Connection) -> None:
    """Run the migrations of the command; leave a transaction that the caller opened open."""
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        version_table_schema=SCHEMA,
        # Compare our schema only: Optuna's tables in schema `optuna` are not ours to drop.
        include_schemas=True,
        include_name=lambda name, kind, _: kind != "schema" or name == SCHEMA,
        compare_server_default=True,
    )
    with context.begin_transaction():
        context.run_migrations()


# `service.operations.migrations` passes a connection, to be part of its transaction, or a URL.
attributes = context.config.attributes
if "connection" in attributes:
    run_on(attributes["connection"])
else:
    engine = create_locking_engine(attributes["url"], attributes["lock_seconds"])
    with engine.connect() as connection:
        run_on(connection)
