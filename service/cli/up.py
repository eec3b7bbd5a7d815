"""`warmscale up`: database, API and fleet on this machine."""

import json
import os

import typer

from service import __version__
from service.cli.common import Exit, fail
from service.local_stack.child_process import ChildError
from service.local_stack.home import HomeInUseError, access_path
from service.local_stack.supervisor import Interrupted, PortTakenError, Stack, log_folder, run_stack
from service.settings import Settings


def run_stack_until_stopped(settings: Settings, fleet: list[str] | None, *, as_json: bool) -> None:
    """Run a stack until Ctrl-C or SIGTERM, and exit with code 1 or 4 if it cannot run."""
    try:
        with run_stack(settings, fleet=fleet, notify=print_message) as running:
            seconds = running.wait_until_ready()
            _print_ready(settings, running, seconds, as_json=as_json)
            running.run_until_stopped()
    except Interrupted:
        print_message("stopped; everything resumes at the next `warmscale up`")
    except (HomeInUseError, PortTakenError) as error:
        fail(Exit.CONFLICT, str(error))
    except (ChildError, ValueError) as error:
        fail(Exit.FAILED, str(error))


def print_message(message: str) -> None:
    """Print a message on stderr: stdout is for results."""
    typer.echo(message, err=True)


def _print_ready(settings: Settings, running: Stack, seconds: float, *, as_json: bool) -> None:
    # A program reads the URL, and the process id to stop, from the JSON line.
    url = running.access.url
    if as_json:
        typer.echo(json.dumps({"url": url, "ready_seconds": round(seconds, 3), "pid": os.getpid()}))
        return
    typer.echo(
        f"warmscale {__version__}, ready in {seconds:.1f} s\n"
        f"  API        {url}/v1\n"
        f"  docs       {url}/docs\n"
        f"  dashboard  {url}/dashboard/ (any user name; the password is the key)\n"
        f"  key        in {access_path(settings.home)}\n"
        f"  logs       {log_folder(settings)}\n"
        "Ctrl-C stops it; everything resumes from where it was."
    )
