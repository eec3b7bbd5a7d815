"""Follow a study: a live screen, plain lines, or JSON lines. Survives restarts of the service."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import httpx
from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from service.cli_tables import console, counts
from service.client import Client, ServiceError
from service.lifecycle import FINAL_STUDY_STATES
from service.pace import Pace
from service.protocol import RunView
from service.results.words import nats, spelled
from service.studies.schemas import StudyView

Style = Literal["live", "plain", "json"]

_POLL_SECONDS = 0.5
_TICK_SECONDS = 0.1
_GIVE_UP_SECONDS = 600.0
_SERVER_FAULT = 500


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A study at one moment, the runs that are running, and those that ended since the last."""

    study: StudyView
    running: tuple[RunView, ...]
    ended: tuple[RunView, ...] = ()


def style(*, as_json: bool) -> Style:
    """How to show progress on this standard output."""
    if as_json:
        return "json"
    return "live" if sys.stdout.isatty() else "plain"


def watch(
    client: Client, name: str, how: Style, tick: Callable[[], None] = lambda: None
) -> StudyView:
    """Show a study's progress until it ends; `tick` is called several times a second."""
    match how:
        case "live":
            return _live(client, name, tick)
        case "plain":
            return _lines(client, name, tick, plain_line)
        case "json":
            return _lines(client, name, tick, json_line)


def _live(client: Client, name: str, tick: Callable[[], None]) -> StudyView:
    pace, last = Pace(), None
    with Live(console=console(), refresh_per_second=4) as screen:
        for now in snapshots(client, name, tick):
            if now is None:
                screen.update(Group(*_parts(last, pace), Text("the service is away; waiting")))
                continue
            pace.see(time.monotonic(), now.study)
            last = now
            screen.update(Group(*_parts(now, pace)))
    assert last is not None
    return last.study


def _lines(
    client: Client, name: str, tick: Callable[[], None], line_of: Callable[[Snapshot], str]
) -> StudyView:
    last, said = None, ""
    for now in snapshots(client, name, tick):
        if now is None:
            continue
        for line in (*ended_lines(now, line_of), line_of(now)):
            if line != said:
                print(line, flush=True)
                said = line
        last = now
    assert last is not None
    return last.study
