"""The supervisor of a local stack: it starts database, API and fleet, and stops them in order.

Each child runs in its own session, so Ctrl-C reaches the supervisor alone. The supervisor stops the
fleet first: its running trials write a checkpoint and release their leases. Then it stops the API
and the database. Runs that were in progress resume at the next start.
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
    """An address on which the API cannot listen, for example because the port is taken."""


class Interrupted(Exception):  # noqa: N818 - a request, not an error
    """A SIGINT or SIGTERM that has arrived: the stack must stop."""


@dataclass
class StopSignals:
    """A count of the stop signals; after the second signal the supervisor stops waiting."""

    count: int = 0

    def count_signal(self, _number: int, _frame: FrameType | None) -> None:
        """Count a signal: a signal handler."""
        self.count += 1

    def must_hurry(self) -> bool:
        """Return True if the user has asked twice: kill the children now."""
        return self.count > 1


@dataclass(kw_only=True)
class Stack:
    """A running stack: call `check_children` several times a second."""

    access: homes.Access
    children: tuple[Child, ...]
    signals: StopSignals
    notify: Callable[[str], None]
    started_at: float = field(default_factory=time.monotonic)

    def check_children(self) -> None:
        """Restart each child that has exited.

        Raises:
            Interrupted: the user or the system has asked the supervisor to stop.
            ChildError: a child has exited five times in a row soon after its start.
        """
        if self.signals.count:
            raise Interrupted
        for child in self.children:
            child.restart_if_exited(self.notify)

    def wait_until_ready(self) -> float:
        """Wait until the API is ready, and return the seconds since the start of the stack.

        Raises:
            Interrupted, ChildError: see `check_children`.
        """
        with httpx.Client(base_url=self.access.url, timeout=2.0) as http:
            while not _is_ready(http):
                self.check_children()
                time.sleep(_POLL_SECONDS)
        return time.monotonic() - self.started_at

    def run_until_stopped(self) -> None:
        """Check the children until `check_children` raises."""
        while True:
            self.check_children()
            time.sleep(_POLL_SECONDS)


def _is_ready(http: httpx.Client) -> bool:
    try:
        return http.get("/readyz").is_success
    except httpx.TransportError:
        return False


@contextmanager
def run_stack(
    settings: Settings, *, fleet: list[str] | None, notify: Callable[[str], None]
) -> Generator[Stack]:
    """Start database, API and fleet of the home in `settings`; stop them when the block ends.

    `fleet` holds the fleet's command-line options; None starts no fleet. `notify` gets a message
    for each restart of a child.

    Raises:
        HomeInUseError: another supervisor has locked this home.
        PortTakenError: the API cannot listen on its port.
        ValueError: the home's client.json is damaged.
    """
    started_at, signals = time.monotonic(), StopSignals()
    with homes.hold_home(settings.home), _count_stop_signals(signals):
        settings = settings.model_copy(
            update={"port": find_free_port(settings.host, settings.port)}
        )
        access = _write_access(settings)
        with open_database(settings) as url:
            children = _make_children(settings, url, access, fleet)
            try:
                for child in children:
                    child.start()
                yield Stack(
                    access=access,
                    children=children,
                    signals=signals,
                    notify=notify,
                    started_at=started_at,
                )
            finally:
                # The fleet first: it needs a running API to release its leases. A lease that is
                # not released blocks its trial for 30 s, until the lease expires.
                for child in reversed(children):
                    child.stop(hurry=signals.must_hurry)


@contextmanager
def _count_stop_signals(signals: StopSignals) -> Generator[None]:
    before = {number: signal.signal(number, signals.count_signal) for number in _STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def find_free_port(host: str, port: int) -> int:
    """Return `port` if it is free, or any free port if `port` is 0.

    Raises:
        PortTakenError: the process cannot listen on `port`.
    """
    # Another process could take the port between this probe and the API's start. Then the API
    # exits, and the supervisor restarts it or reports its log.
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            message = f"cannot listen on {host}:{port} ({error.strerror}); "
            works = "choose another port with --port, or any free port with --port 0"
            raise PortTakenError(message + works) from None
        return probe.getsockname()[1]


def _write_access(settings: Settings) -> homes.Access:
    """Write client.json with this start's URL, and the last start's key or a new key."""
    before = homes.read_access(settings.home)
    key = before.key if before else f"ws_{secrets.token_urlsafe(32)}"
    access = homes.Access(url=f"http://{settings.host}:{settings.port}", key=key)
    homes.write_access(settings.home, access)
    return access


def _make_children(
    settings: Settings, url: URL, access: homes.Access, fleet: list[str] | None
) -> tuple[Child, ...]:
    logs = settings.home / "logs"
    logs.mkdir(exist_ok=True)
    common = os.environ | {"TZ": "UTC", "PYTHONUNBUFFERED": "1"}
    keys = {"WARMSCALE_API_KEY": access.key, "WARMSCALE_FLEET_KEY": _derive_fleet_key(access.key)}
    api = Child(
        name="API",
        command=_make_command("serve", "--supervised"),
        environment=common | keys | _make_api_environment(settings, url),
        log=logs / "api.log",
        stop_seconds=_API_STOP_SECONDS,
    )
    if fleet is None:
        return (api,)
    options = ["--supervised", "--url", access.url, *fleet]
    # A worker gets a key of scope `work`, and never the database's credentials.
    unprivileged = {k: v for k, v in common.items() if k != "WARMSCALE_DATABASE_URL"}
    unprivileged["WARMSCALE_API_KEY"] = keys["WARMSCALE_FLEET_KEY"]
    return (
        api,
        Child(
            name="fleet",
            command=_make_command("fleet", *options),
            environment=unprivileged,
            log=logs / "fleet.log",
            stop_seconds=_FLEET_STOP_SECONDS,
        ),
    )


def _derive_fleet_key(key: str) -> str:
    """Return the fleet's key, the same at every start; it does not reveal the admin key."""
    # Derived with HMAC: every start admits the same key, and no second key needs a file. A worker
    # cannot invert HMAC to get the admin key.
    return f"ws_{hmac.new(key.encode(), b'fleet', hashlib.sha256).hexdigest()}"


def _make_api_environment(settings: Settings, url: URL) -> dict[str, str]:
    return {
        "WARMSCALE_DATABASE_URL": url.render_as_string(hide_password=False),
        "WARMSCALE_HOME": str(settings.home.resolve()),
        "WARMSCALE_HOST": settings.host,
        "WARMSCALE_PORT": str(settings.port),
        "WARMSCALE_DATA_ROOTS": ":".join(map(str, _list_readable_folders(settings))),
    }


def _list_readable_folders(settings: Settings) -> tuple[Path, ...]:
    """Return the folders that studies may read, for the API's environment."""
    # The API gets a database URL, so it cannot tell from its settings that it belongs to a local
    # stack, where every folder is readable. Therefore the supervisor passes the folders explicitly.
    readable = settings.readable
    return (Path("/"),) if readable is None else readable


def _make_command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "service.cli", *arguments]


def log_folder(settings: Settings) -> Path:
    """Return the folder of the children's logs."""
    return settings.home / "logs"
