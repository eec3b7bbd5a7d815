"""One transaction on the database for an admin command, and the message when that fails."""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from service.cli.common import Exit, fail, load_settings

if TYPE_CHECKING:
    from sqlalchemy.orm import Session


@contextmanager
def begin_transaction(home: Path) -> Generator["Session"]:
    """One transaction on the database, embedded or not."""
    from sqlalchemy import NullPool, create_engine
    from sqlalchemy.orm import Session

    from service.database.engine import open_database

    with exit_on_database_errors(), open_database(load_settings(home)) as url:
        engine = create_engine(url, poolclass=NullPool)
        with Session(engine) as session, session.begin():
            yield session


@contextmanager
def exit_on_database_errors() -> Generator[None]:
    """Say shortly that a database cannot be reached, or is not as this version needs it."""
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
