"""What a route is given: one database session per request, which commits with it."""

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
    """Runs store functions in a thread, each a unit of work that has committed when it returns.

    For the calls that a fleet lives by: a session as a dependency of a plain route costs three
    more changes of thread, which is most of the time of a small request.
    """

    def __init__(self, sessions: sessionmaker[Session]) -> None:
        self._sessions = sessions

    async def __call__(
        self, store: Callable[Concatenate[Session, P], R], *args: P.args, **kwargs: P.kwargs
    ) -> R:
        return await run_in_threadpool(self._whole, store, *args, **kwargs)

    def _whole(
        self, store: Callable[Concatenate[Session, P], R], *args: P.args, **kwargs: P.kwargs
    ) -> R:
        with self._sessions.begin() as session:
            return store(session, *args, **kwargs)


def _session(request: Request) -> Generator[Session]:
    """One unit of work: commit when the route returned, roll back when it raised."""
    with find_service(request.app, Database).sessions.begin() as session:
        yield session


# What does not block is async: FastAPI takes a plain function to a thread.
async def _work(request: Request) -> WorkRunner:
    return WorkRunner(find_service(request.app, Database).sessions)


async def _settings(request: Request) -> Settings:
    return find_service(request.app, Settings)


# Function scope: the commit happens before the response is sent, so that an answer is a promise.
DbSession = Annotated[Session, Depends(_session, scope="function")]
UnitOfWork = Annotated[WorkRunner, Depends(_work)]
TheSettings = Annotated[Settings, Depends(_settings)]
