"""A database transaction for an admin command, and the messages of its errors."""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from service.cli.common import Exit, fail, load_settings

if TYPE_CHECKING:
    from sqlalchemy.orm import Session


@contextmanager
def begin_transaction(home: Path) -> Generator["Session"]:
    """Open a session in a transaction, on the configured or the embedded database."""
    from sqlalchemy import NullPool, create_engine
    from sqlalchemy.orm import Session

    from service.database.engine import open_database

    with exit_on_database_errors(), open_database(load_settings(home)) as url:
        # A command uses a single connection and then exits, so a pool has no use.
        engine = create_engine(url, poolclass=NullPool)
        with Session(engine) as session, session.begin():
            yield session


@contextmanager
def exit_on_database_errors() -> Generator[None]:
    """Turn database errors in the block into a short message and an exit code.

    3: the database cannot be reached. 4: its tables are not of this version. 2: a bad setting.
    """
    from sqlalchemy.exc import OperationalError, ProgrammingError

    from service.operations.migrations import LockBusyError
    from service.operations.revisions import NewerDatabaseError
    from service.optuna_bridge.installed_optuna import UnknownOptunaError

    try:
        yield
    except OperationalError as error:
        fail(Exit.UNREACHABLE, f"cannot reach the database: {str(error.orig).strip()}")
    except ProgrammingError as error:
        works = "run `warmscale db upgrade` first"
        fail(Exit.CONFLICT, f"{str(error.orig).splitlines()[0]}; {works}")
    except (LockBusyError, NewerDatabaseError, UnknownOptunaError) as error:
        fail(Exit.CONFLICT, str(error))
    except ValueError as error:
        fail(Exit.USAGE, str(error))
