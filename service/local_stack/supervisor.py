"""The supervisor of a local stack: database, API and fleet, started together, stopped in order.

The children stand in sessions of their own, so that Ctrl-C reaches the supervisor alone. It stops
the fleet first (whose running trials checkpoint and give back their leases), then the API, then the
database: whatever was running resumes at the next start.
"""

import hashlib
import hmac
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import httpx
from sqlalchemy.engine import URL

from service.database.engine import open_database
from service.local_stack import home as homes
from service.local_stack.child_process import Child
from service.settings import Settings

_FLEET_STOP_SECONDS = 90.0
_API_STOP_SECONDS = 15.0
_POLL_SECONDS = 0.05
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class PortTakenError(Exception):
    """Something else listens where the API should."""


class Interrupted(Exception):  # noqa: N818 - a request, not an error
    """SIGINT or SIGTERM arrived: stop."""


@dataclass
class Signals:
    """How often this process was asked to stop; the second time means at once."""

    count: int = 0

    def hear(self, _number: int, _frame: FrameType | None) -> None:
        """Count one."""
        self.count += 1

    def hurry(self) -> bool:
        """Whether to stop waiting for an orderly end."""
        return self.count > 1


@dataclass(kw_only=True)
class Stack:
    """A running stack. `check` is to be called several times a second."""

    access: homes.Access
    children: tuple[Child, ...]
    signals: Signals
    say: Callable[[str], None]
    started_at: float = field(default_factory=time.monotonic)

    def check(self) -> None:
        """Look after the children.

        Raises:
            Interrupted: it is time to stop.
            ChildError: a child cannot be kept running.
        """
        if self.signals.count:
            raise Interrupted
        for child in self.children:
            child.check(self.say)

    def wait_until_ready(self) -> float:
        """Wait for the API; give the seconds since the start."""
        with httpx.Client(base_url=self.access.url, timeout=2.0) as http:
            while not _is_ready(http):
                self.check()
                time.sleep(_POLL_SECONDS)
        return time.monotonic() - self.started_at

    def run(self) -> None:
        """Look after the children until told to stop."""
        while True:
            self.check()
            time.sleep(_POLL_SECONDS)


def _is_ready(http: httpx.Client) -> bool:
    try:
        return http.get("/readyz").is_success
    except httpx.TransportError:
        return False


@contextmanager
def stack(
    settings: Settings, *, fleet: list[str] | None, say: Callable[[str], None]
) -> Generator[Stack]:
    """Start everything below a home folder; stop it in order on the way out.

    `fleet` are the fleet's options; None starts none.

    Raises:
        HomeInUseError: another supervisor has this home.
        PortTakenError: the API cannot listen.
    """
    started_at, signals = time.monotonic(), Signals()
    with homes.held(settings.home), _heard(signals):
        settings = settings.model_copy(update={"port": free_port(settings.host, settings.port)})
        access = _access(settings)
        with open_database(settings) as url:
            children = _children(settings, url, access, fleet)
            try:
                for child in children:
                    child.start()
                yield Stack(
                    access=access,
                    children=children,
                    signals=signals,
                    say=say,
                    started_at=started_at,
                )
            finally:
                for child in reversed(children):  # the fleet needs the API to give back its leases
                    child.stop(hurry=signals.hurry)


@contextmanager
def _heard(signals: Signals) -> Generator[None]:
    before = {number: signal.signal(number, signals.hear) for number in _STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def free_port(host: str, port: int) -> int:
    """`port` if it is free, any free one for 0.

    Raises:
        PortTakenError: it is not.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            message = f"cannot listen on {host}:{port} ({error.strerror}); "
            works = "choose another with --port, or --port 0 for any free one"
            raise PortTakenError(message + works) from None
        return probe.getsockname()[1]


def _access(settings: Settings) -> homes.Access:
    """The key of the last start, or a new one; written with this start's URL."""
    before = homes.read_access(settings.home)
    key = before.key if before else f"ws_{secrets.token_urlsafe(32)}"
    access = homes.Access(url=f"http://{settings.host}:{settings.port}", key=key)
    homes.write_access(settings.home, access)
    return access


def _children(
    settings: Settings, url: URL, access: homes.Access, fleet: list[str] | None
) -> tuple[Child, ...]:
    logs = settings.home / "logs"
    logs.mkdir(exist_ok=True)
    common = os.environ | {"TZ": "UTC", "PYTHONUNBUFFERED": "1"}
    keys = {"WARMSCALE_API_KEY": access.key, "WARMSCALE_FLEET_KEY": _fleet_key(access.key)}
    api = Child(
        name="API",
        command=_warmscale("serve", "--supervised"),
        environment=common | keys | _api_environment(settings, url),
        log=logs / "api.log",
        stop_seconds=_API_STOP_SECONDS,
    )
    if fleet is None:
        return (api,)
    options = ["--supervised", "--url", access.url, *fleet]
    # A worker holds a token that may work, never the database's credentials.
    unprivileged = {k: v for k, v in common.items() if k != "WARMSCALE_DATABASE_URL"}
    unprivileged["WARMSCALE_API_KEY"] = keys["WARMSCALE_FLEET_KEY"]
    return (
        api,
        Child(
            name="fleet",
            command=_warmscale("fleet", *options),
            environment=unprivileged,
            log=logs / "fleet.log",
            stop_seconds=_FLEET_STOP_SECONDS,
        ),
    )


def _fleet_key(key: str) -> str:
    """The fleet's key: the same at every start, and no way back to the supervisor's."""
    return f"ws_{hmac.new(key.encode(), b'fleet', hashlib.sha256).hexdigest()}"


def _api_environment(settings: Settings, url: URL) -> dict[str, str]:
    return {
        "WARMSCALE_DATABASE_URL": url.render_as_string(hide_password=False),
        "WARMSCALE_HOME": str(settings.home.resolve()),
        "WARMSCALE_HOST": settings.host,
        "WARMSCALE_PORT": str(settings.port),
        "WARMSCALE_DATA_ROOTS": ":".join(map(str, _readable(settings))),
    }


def _readable(settings: Settings) -> tuple[Path, ...]:
    """To be said: for the API alone, which has a database's URL, it is no longer to be seen."""
    readable = settings.readable
    return (Path("/"),) if readable is None else readable


def _warmscale(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "service.cli", *arguments]


def log_folder(settings: Settings) -> Path:
    """Where the children's output goes."""
    return settings.home / "logs"
