"""The parameters that FastAPI gives to routes: a database session, a worker of them, settings."""

from collections.abc import Callable, Generator
from typing import Annotated, Concatenate, ParamSpec, TypeVar

from fastapi import Depends, Request
from sqlalchemy.orm import Session, sessionmaker
from starlette.concurrency import run_in_threadpool

from service.settings import Settings
from service.web.services import Database, find_service

P = ParamSpec("P")
R = TypeVar("R")


class WorkRunner:
    """A runner of store functions in threads; each commits before the call returns.

    The frequent calls of a fleet use this. A `DbSession` in a plain route costs three more changes
    of thread, and those take most of the time of a small request.
    """

    def __init__(self, sessions: sessionmaker[Session]) -> None:
        self._sessions = sessions

    async def __call__(
        self, store: Callable[Concatenate[Session, P], R], *args: P.args, **kwargs: P.kwargs
    ) -> R:
        return await run_in_threadpool(self._run_and_commit, store, *args, **kwargs)

    def _run_and_commit(
        self, store: Callable[Concatenate[Session, P], R], *args: P.args, **kwargs: P.kwargs
    ) -> R:
        with self._sessions.begin() as session:
            return store(session, *args, **kwargs)


def _open_session(request: Request) -> Generator[Session]:
    """Yield a session; commit it when the route returns, roll it back when the route raises."""
    with find_service(request.app, Database).sessions.begin() as session:
        yield session


# These two are async although they wait for nothing: FastAPI runs a plain function in a thread.
async def _make_runner(request: Request) -> WorkRunner:
    return WorkRunner(find_service(request.app, Database).sessions)


async def _find_settings(request: Request) -> Settings:
    return find_service(request.app, Settings)


# `scope="function"` commits before the response is sent. With FastAPI's default the commit comes
# after it: a client could read a 201 for a study that was never stored.
DbSession = Annotated[Session, Depends(_open_session, scope="function")]
UnitOfWork = Annotated[WorkRunner, Depends(_make_runner)]
TheSettings = Annotated[Settings, Depends(_find_settings)]
