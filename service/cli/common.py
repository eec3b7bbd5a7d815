"""What the commands share: options, exit codes, the connection, how errors are said."""

import json
import os
import re
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from service.local_stack import home as homes
from service.protocol import PROJECT_PATTERN

if TYPE_CHECKING:
    from pydantic import BaseModel

    from service.client import Client, ServiceError
    from service.settings import Settings

DEFAULT_URL = "http://127.0.0.1:8765"
PATIENCE_SECONDS = 3.0

Home = Annotated[
    Path,
    typer.Option(
        envvar="WARMSCALE_HOME", help="Folder of the local stack: database, checkpoints, its key."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Project = Annotated[
    str | None,
    typer.Option(envvar="WARMSCALE_PROJECT", help="The project to work in, for keys of several."),
]
StudyName = Annotated[str, typer.Argument(metavar="STUDY", help="A study's name or id.")]

EXIT_CODES = """Exit codes:
0  done
1  the study failed, there is no verdict, a slope of coord-check is not flat, or db check
   found what must not be
2  wrong usage, or a bad spec
3  the service cannot be reached
4  not found, or in conflict with what is there
5  the API key is missing or refused"""


class Exit(IntEnum):
    """What a command's exit code says."""

    OK = 0
    FAILED = 1
    USAGE = 2
    UNREACHABLE = 3
    CONFLICT = 4
    REFUSED = 5


def fail(code: Exit, message: str) -> NoReturn:
    """Say on one screen what is wrong, and end."""
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(code)


def check_project(project: str | None) -> str | None:
    """A project's name that is to be written, if it may be one."""
    if project is not None and not re.fullmatch(PROJECT_PATTERN, project):
        fail(Exit.USAGE, f"--project: must match {PROJECT_PATTERN} (got {project!r})")
    return project


def print_json(items: "Iterable[BaseModel]") -> None:
    """Print a list for programs."""
    typer.echo(json.dumps([item.model_dump(mode="json") for item in items]))


def find_access(home: Path, *, url: str | None = None) -> homes.Access:
    """Where the service is and the key to it: as given, from the environment, or from the home.

    The home's key is for the home's own service: another URL needs its key beside it.
    """
    try:
        local = homes.read_access(home)
    except ValueError as error:
        fail(Exit.USAGE, str(error))
    url = url or os.environ.get("WARMSCALE_URL") or (local.url if local else DEFAULT_URL)
    key = os.environ.get("WARMSCALE_API_KEY")
    if key is None and local is not None and local.url == url.rstrip("/"):
        key = local.key
    if key is None:
        works = (
            "set WARMSCALE_API_KEY to one of its own, or start a local stack with `warmscale up`"
        )
        fail(Exit.REFUSED, f"no API key for {url} (none in {home / 'client.json'}); {works}")
    return homes.Access(url=url, key=key)


@contextmanager
def connect_client(
    home: Path, project: str | None = None, patience_seconds: float = PATIENCE_SECONDS
) -> Generator["Client"]:
    """A client of the service; whatever it answers badly ends the command with a short message."""
    from httpx import InvalidURL, TransportError  # `--help` need not wait for it

    from service.client import BadAnswerError, Client, ServiceError

    found, project = find_access(home), project or os.environ.get("WARMSCALE_PROJECT")
    try:
        with Client(
            found.url, found.key, project=project, patience_seconds=patience_seconds
        ) as client:
            yield client
    except ServiceError as error:
        fail(choose_exit_code(error.status), describe_problem(error))
    except BadAnswerError as error:
        fail(Exit.UNREACHABLE, f"{error}; is {found.url} a warmscale of this version?")
    except (TransportError, InvalidURL) as error:
        works = "is it running? start one with `warmscale up`, or set WARMSCALE_URL"
        fail(Exit.UNREACHABLE, f"cannot reach {found.url} ({error}); {works}")


def choose_exit_code(status: int) -> Exit:
    """The exit code for a problem's HTTP status."""
    match status:
        case 401 | 403:
            return Exit.REFUSED
        case 404 | 409:
            return Exit.CONFLICT
        case _ if status >= 500:  # noqa: PLR2004 - HTTP: the server's fault
            return Exit.UNREACHABLE
        case _:
            return Exit.USAGE


def describe_problem(error: "ServiceError") -> str:
    """A problem as lines: each bad field with its value and what works, else the detail."""
    fields = [_describe_field(field) for field in error.problem.get("errors") or []]
    return "\n".join(fields) or str(error.problem.get("detail") or error)


def _describe_field(field: dict[str, Any]) -> str:
    value = field.get("value")
    got = "" if value is None else f" (got {value!r})"
    return f"{field.get('path') or 'spec'}: {field.get('message')}{got}"


def quote_name(name: str) -> str:
    """A name as one segment of a path."""
    from urllib.parse import quote

    return quote(name, safe="")


def load_settings(home: Path, **given: Any) -> "Settings":
    """Settings from the environment, with what the command line gave in front."""
    from pydantic import ValidationError

    from service.settings import Settings

    chosen = {name: value for name, value in given.items() if value is not None}
    try:
        return Settings(home=home, **chosen)
    except ValidationError as error:
        first = error.errors()[0]
        name = "WARMSCALE_" + "_".join(str(part) for part in first["loc"]).upper()
        fail(Exit.USAGE, f"{name}: {first['msg']} (got {first['input']!r})")
