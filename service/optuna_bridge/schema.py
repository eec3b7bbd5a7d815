"""Creation and upgrade of Optuna's tables in the schema `optuna`, by Optuna's own migrations."""

from functools import cache
from pathlib import Path

import optuna
from alembic.config import Config
from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext, RevisionStep
from alembic.script import ScriptDirectory
from optuna.storages import RDBStorage
from sqlalchemy import Connection, text

from service.database.tables import OPTUNA_SCHEMA
from service.optuna_bridge.installed_optuna import (
    KNOWN_COLUMNS,
    KNOWN_REVISION,
    UnknownOptunaError,
)

# `_rdb.models` is private. A restore needs it to create Optuna's tables in its own transaction.
try:
    from optuna.storages._rdb import models
except ImportError as error:
    raise UnknownOptunaError(f"it has no {error.name}") from error

# Without this index, Optuna searches all trials of a study for a trial's number.
_CREATE_INDEX = "CREATE INDEX IF NOT EXISTS ix_warmscale_number ON optuna.trials (study_id, number)"


@cache
def check_installed_optuna() -> None:
    """Compare the installed Optuna's tables with the known tables; call before any write to them.

    Raises:
        UnknownOptunaError: its newest revision, or the columns of a table that we use, differ.
    """
    # Example: Optuna 6 moves `trials.state` to another table, in a migration named v6.0.0.a. Then
    # our SQL would fail in the middle of a lease, or write rows that Optuna cannot read. The
    # revision alone is no proof: a release can change the models without a migration. The check
    # compares both, once per process.
    newest = list_revisions()[-1]
    if newest != KNOWN_REVISION:
        raise UnknownOptunaError(f"its tables are at revision {newest}")
    tables = models.BaseModel.metadata.tables
    for name, known in KNOWN_COLUMNS.items():
        columns = frozenset(tables[name].columns.keys() if name in tables else ())
        if columns != known:
            raise UnknownOptunaError(f"its table {name} has the columns {sorted(columns)}")


def upgrade_tables(url: str) -> None:
    """Create Optuna's tables, or upgrade them to the installed version; one caller at a time.

    Raises:
        UnknownOptunaError: see `check_installed_optuna`.
    """
    check_installed_optuna()
    storage = RDBStorage(url, skip_compatibility_check=True)
    storage.upgrade()
    with storage.engine.begin() as connection:
        _complete_tables(connection)
    storage.engine.dispose()


def list_revisions() -> tuple[str, ...]:
    """Return the revisions of the installed Optuna's migrations, oldest first."""
    return tuple(script.revision for script in _load_scripts().walk_revisions())[::-1]


def create_tables(connection: Connection, revision: str) -> None:
    """Create empty tables as of `revision`, in the connection's transaction."""
    # At the newest revision, create the tables as a new installation has them: Optuna's migrations,
    # run from the first on, give an index another name.
    _set_search_path(connection)
    if revision == list_revisions()[-1]:
        models.BaseModel.metadata.create_all(connection)
        _make_context(connection).stamp(_load_scripts(), revision)
    else:
        migrate_tables(connection, revision)


def migrate_tables(connection: Connection, revision: str) -> None:
    """Upgrade the tables to `revision`, in the connection's transaction."""
    _set_search_path(connection)
    context = _make_context(connection, revision)
    with Operations.context(context):
        context.run_migrations()
    if revision == list_revisions()[-1]:
        connection.execute(
            text("UPDATE version_info SET schema_version = :schema, library_version = :library"),
            {"schema": models.SCHEMA_VERSION, "library": optuna.__version__},
        )
        _complete_tables(connection)


def _complete_tables(connection: Connection) -> None:
    # Optuna's migrations leave out our index, and the state WAITING, which came with Optuna
    # 1.2: only the tables of a new installation have it in their type.
    connection.execute(text(_CREATE_INDEX))
    connection.execute(text("ALTER TYPE trialstate ADD VALUE IF NOT EXISTS 'WAITING'"))


def _set_search_path(connection: Connection) -> None:
    # Optuna's migrations name no schema: the search path decides where the tables go.
    connection.execute(text(f"SET LOCAL search_path TO {OPTUNA_SCHEMA}"))


def _make_context(connection: Connection, revision: str = "head") -> MigrationContext:
    scripts = _load_scripts()

    def steps(found: str, _: MigrationContext) -> list[RevisionStep]:
        return scripts._upgrade_revs(revision, found)  # noqa: SLF001 # pyright: ignore[reportPrivateUsage] - as Alembic's manual does

    opts = {"script": scripts, "version_table_schema": OPTUNA_SCHEMA, "fn": steps}
    return MigrationContext.configure(connection, opts=opts)


def _load_scripts() -> ScriptDirectory:
    folder = Path(models.__file__).with_name("alembic")
    config = Config()
    config.set_main_option("script_location", str(folder).replace("%", "%%"))
    return ScriptDirectory.from_config(config)
