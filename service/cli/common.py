"""The shared parts of the commands: options, exit codes, the client, and error messages."""

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
# A command retries for this time while the service restarts, then reports that it is unreachable.
PATIENCE_SECONDS = 3.0

Home = Annotated[
    Path,
    typer.Option(
        envvar="WARMSCALE_HOME", help="Folder of the local stack: database, checkpoints, API key."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Project = Annotated[
    str | None,
    typer.Option(
        envvar="WARMSCALE_PROJECT", help="The project to use, if the key sees several projects."
    ),
]
StudyName = Annotated[str, typer.Argument(metavar="STUDY", help="A study's name or id.")]

EXIT_CODES = """Exit codes:
0  done
1  the study failed or has no verdict, a slope of coord-check is not flat,
   or db check found a violation
2  wrong usage, or a bad spec
3  the service cannot be reached
4  not found, or a conflict with the present state
5  the API key is missing or refused"""


class Exit(IntEnum):
    """Exit codes of the commands; `EXIT_CODES` explains them to users."""

    OK = 0
    FAILED = 1
    USAGE = 2
    UNREACHABLE = 3
    CONFLICT = 4
    REFUSED = 5


def fail(code: Exit, message: str) -> NoReturn:
    """Print an error message on stderr, and exit with `code`."""
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(code)


def check_project(project: str | None) -> str | None:
    """Return the project's name, or exit with code 2 if the name is invalid."""
    if project is not None and not re.fullmatch(PROJECT_PATTERN, project):
        fail(Exit.USAGE, f"--project: must match {PROJECT_PATTERN} (got {project!r})")
    return project


def print_json(items: "Iterable[BaseModel]") -> None:
    """Print the items as a JSON array."""
    typer.echo(json.dumps([item.model_dump(mode="json") for item in items]))


def find_access(home: Path, *, url: str | None = None) -> homes.Access:
    """Return the service's URL and API key: from `url`, from the environment, or from the home.

    Exits with code 5 if no key is known, and with code 2 if the home's file is damaged.
    """
    try:
        local = homes.read_access(home)
    except ValueError as error:
        fail(Exit.USAGE, str(error))
    url = url or os.environ.get("WARMSCALE_URL") or (local.url if local else DEFAULT_URL)
    key = os.environ.get("WARMSCALE_API_KEY")
    # The home's key belongs to the home's service: never send it to another URL.
    if key is None and local is not None and local.url == url.rstrip("/"):
        key = local.key
    if key is None:
        works = (
            "set WARMSCALE_API_KEY to a key of that service, or start a local stack with "
            "`warmscale up`"
        )
        fail(Exit.REFUSED, f"no API key for {url} (none in {home / 'client.json'}); {works}")
    return homes.Access(url=url, key=key)


@contextmanager
def connect_client(
    home: Path, project: str | None = None, patience_seconds: float = PATIENCE_SECONDS
) -> Generator["Client"]:
    """Open a client of the service; its errors end the command with a short message."""
    # Imported here because httpx takes long to import, and `--help` does not need it.
    from httpx import InvalidURL, TransportError

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
    """Return the exit code for the HTTP status of an error."""
    match status:
        case 401 | 403:
            return Exit.REFUSED
        case 404 | 409:
            return Exit.CONFLICT
        case _ if status >= 500:  # noqa: PLR2004 - HTTP: an error of the server
            return Exit.UNREACHABLE
        case _:
            return Exit.USAGE


def describe_problem(error: "ServiceError") -> str:
    """Return a line for each bad field with its value; without bad fields, the detail."""
    fields = [_describe_field(field) for field in error.problem.get("errors") or []]
    return "\n".join(fields) or str(error.problem.get("detail") or error)


def _describe_field(field: dict[str, Any]) -> str:
    # Example: `train.lr: must be at most 1 (got 3.0)`. A missing field has no value to print.
    value = field.get("value")
    got = "" if value is None else f" (got {value!r})"
    return f"{field.get('path') or 'spec'}: {field.get('message')}{got}"


def quote_name(name: str) -> str:
    """Return the name percent-encoded as a segment of a URL path."""
    from urllib.parse import quote

    return quote(name, safe="")


def load_settings(home: Path, **given: Any) -> "Settings":
    """Return the settings of the environment, overridden by the command line's options.

    Exits with code 2 for an invalid value.
    """
    from pydantic import ValidationError

    from service.settings import Settings

    # None: the user has not given this option, so the environment decides.
    chosen = {name: value for name, value in given.items() if value is not None}
    try:
        return Settings(home=home, **chosen)
    except ValidationError as error:
        # The name of the environment variable, since most settings come from there.
        first = error.errors()[0]
        name = "WARMSCALE_" + "_".join(str(part) for part in first["loc"]).upper()
        fail(Exit.USAGE, f"{name}: {first['msg']} (got {first['input']!r})")
