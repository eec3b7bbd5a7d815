"""LeaseServices: the objects of this process that leasing uses."""

from dataclasses import dataclass

from sqlalchemy.orm import Session, sessionmaker

from service.leases.presence import Presence
from service.optuna_bridge.sampler import Sampler
from service.settings import Settings


@dataclass(frozen=True, kw_only=True)
class LeaseServices:
    """Everything of this process that leasing needs; `service.app` makes it once.

    A session of `sessions` is a transaction. In a session of `statements` each statement is a
    transaction of its own: reads use it, since it saves the round trips of BEGIN and ROLLBACK.
    """

    sessions: sessionmaker[Session]
    statements: sessionmaker[Session]
    sampler: Sampler
    settings: Settings
    presence: Presence
