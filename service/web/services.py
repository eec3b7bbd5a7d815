"""The application's long-lived objects, found by their class.

Starlette's `app.state` is untyped: a misspelled or removed attribute fails only when a request
reads it. `find_service` returns the type that its caller names, and pyright checks each use. The
function knows no class, so it can stay below the packages that define them.
"""

from dataclasses import dataclass
from typing import TypeVar

from sqlalchemy import Engine
from sqlalchemy.orm import Session, sessionmaker
from starlette.applications import Starlette

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Database:
    """The service's own engine, and the two kinds of sessions on it.

    A session of `sessions` is a unit of work: BEGIN, then COMMIT or ROLLBACK. In a session of
    `statements` each statement is a transaction of its own, without those two round trips.
    """

    engine: Engine
    sessions: sessionmaker[Session]
    statements: sessionmaker[Session]


def provide_services(app: Starlette, *services: object) -> None:
    """Keep each object under its class; a later object of the same class replaces it."""
    # Tests replace an object this way. Parts that were given the old one keep it.
    kept: dict[type, object] = getattr(app.state, "services", {})
    app.state.services = kept | {type(service): service for service in services}


def find_service(app: Starlette, kind: type[T]) -> T:
    """Return the application's object of exactly this class.

    Raises:
        KeyError: `provide_services` was not given an object of this class.
    """
    service = app.state.services[kind]
    assert isinstance(service, kind)
    return service
