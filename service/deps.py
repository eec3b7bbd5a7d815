"""What a route is given: one database session per request, which commits with it; the sampler."""

from collections.abc import Generator
from typing import Annotated

from fastapi import Depends, Request
from sqlalchemy.orm import Session

from service.leases.repair import Presence
from service.sampler import Sampler
from service.settings import Settings


def _session(request: Request) -> Generator[Session]:
    """One unit of work: commit when the route returned, roll back when it raised."""
    with request.app.state.sessions.begin() as session:
        yield session


def _sampler(request: Request) -> Sampler:
    return request.app.state.sampler


def _settings(request: Request) -> Settings:
    return request.app.state.settings


def _presence(request: Request) -> Presence:
    return request.app.state.presence


# Function scope: the commit happens before the response is sent, so that an answer is a promise.
DbSession = Annotated[Session, Depends(_session, scope="function")]
TheSampler = Annotated[Sampler, Depends(_sampler)]
ThePresence = Annotated[Presence, Depends(_presence)]
TheSettings = Annotated[Settings, Depends(_settings)]
