"""The home folder of a local stack: the lock of its supervisor, and the file that clients read."""

import fcntl
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from warmcore.storage.atomic_writes import ONLY_THIS_USER, write_file

DEFAULT_HOME = Path(".warmscale")


class HomeInUseError(Exception):
    """A home folder that another supervisor has locked."""


class Access(BaseModel):
    """The URL of a service and an API key for it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: str
    key: str


def read_access(home: Path) -> Access | None:
    """Return the URL and key that the last `warmscale up` wrote; None if this home has no file.

    Raises:
        ValueError: the file exists, and `up` cannot have written its content.
    """
    path = access_path(home)
    try:
        return Access.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError:
        raise ValueError(f"{path} is damaged; delete it and run `warmscale up` again") from None


def write_access(home: Path, access: Access) -> None:
    """Write the URL and key for clients, readable by this user alone, in one atomic step."""
    with write_file(access_path(home), mode=ONLY_THIS_USER) as file:
        file.write(access.model_dump_json().encode())


def access_path(home: Path) -> Path:
    """Return the path of the home's access file."""
    return home / "client.json"


@contextmanager
def hold_home(home: Path) -> Generator[None]:
    """Lock the home for the duration of the `with` block.

    Raises:
        HomeInUseError: another process has locked it.
    """
    home.mkdir(parents=True, exist_ok=True)
    with (home / "up.lock").open("a+") as file:
        try:
            # The kernel releases a flock when the process ends, even after kill -9: no stale lock
            # can remain. The file's content, the process id, serves the error message alone.
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise HomeInUseError(
                f"{home} is in use by another `warmscale up` (process {holder}); "
                "stop that process, or choose another --home"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
