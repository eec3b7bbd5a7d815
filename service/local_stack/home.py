"""The home folder of a local stack: who may use it, and how a client finds its service."""

import fcntl
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from warmcore.storage.atomic_writes import ONLY_THIS_USER, write_file

DEFAULT = Path(".warmscale")


class HomeInUseError(Exception):
    """Another supervisor holds this home."""


class Access(BaseModel):
    """Where a service is, and the key to it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: str
    key: str


def read_access(home: Path) -> Access | None:
    """What the last `warmscale up` of this home left for clients; None when there is none.

    Raises:
        ValueError: the file is there but is not what `up` writes.
    """
    path = access_path(home)
    try:
        return Access.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError:
        raise ValueError(f"{path} is damaged; delete it and run `warmscale up` again") from None


def write_access(home: Path, access: Access) -> None:
    """Leave it for clients: readable by this user alone, and never half written."""
    with write_file(access_path(home), mode=ONLY_THIS_USER) as file:
        file.write(access.model_dump_json().encode())


def access_path(home: Path) -> Path:
    """Where the access of a home is kept."""
    return home / "client.json"


@contextmanager
def held(home: Path) -> Generator[None]:
    """Hold the home while inside. The kernel lets go of it however this process ends.

    Raises:
        HomeInUseError: another process holds it.
    """
    home.mkdir(parents=True, exist_ok=True)
    with (home / "up.lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise HomeInUseError(
                f"{home} is in use by another `warmscale up` (process {holder}); "
                "stop that one, or choose another --home"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
