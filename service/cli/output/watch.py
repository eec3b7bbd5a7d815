"""The progress of a study: a live screen, plain lines or JSON lines, through service restarts."""

import json
import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import httpx
import typer
from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from service.cli.output.eta import Pace
from service.cli.output.tables import format_counts, make_console
from service.client import Client, ServiceError
from service.lifecycle import FINAL_STUDY_STATES
from service.results.wording import format_nats, format_parameter, format_tokens, label_run
from service.runs.schemas import RunView
from service.studies.schemas import StudyView

Style = Literal["live", "plain", "json"]
Tick = Callable[[], None]
Show = Callable[["Snapshot"], None]

# The client polls for a new snapshot. Between polls it calls `tick`, so that a supervisor in this
# process can check its children.
_POLL_SECONDS = 0.5
_TICK_SECONDS = 0.1
# A restart of the service or an upgrade of its database may take minutes.
_GIVE_UP_SECONDS = 600.0
_SERVER_FAULT = 500
_RUN_FIELDS = {
    "id",
    "kind",
    "arm",
    "branch",
    "trial_number",
    "step",
    "num_steps",
    "tokens_per_second",
}


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A study and its running runs at one time.

    `ended`: the runs that have ended since the last snapshot. `unreachable`: the service did not
    respond, and the other fields are those of the last snapshot.
    """

    study: StudyView
    running: tuple[RunView, ...]
    ended: tuple[RunView, ...] = ()
    unreachable: bool = False


def choose_style(*, as_json: bool) -> Style:
    """Return the style for stdout: JSON if asked for, a live screen on a terminal, else lines."""
    if as_json:
        return "json"
    return "live" if sys.stdout.isatty() else "plain"


def watch_study(client: Client, name: str, how: Style, tick: Tick = lambda: None) -> StudyView:
    """Show a study's progress until it ends, and call `tick` ten times a second.

    Raises: see `follow_study`.
    """
    last: Snapshot | None = None
    with {"live": _draw_screen, "plain": _print_lines, "json": _print_json_lines}[how]() as show:
        for last in follow_study(client, name, tick):
            show(last)
    assert last is not None
    return last.study


def follow_study(client: Client, name: str, tick: Tick) -> Iterator[Snapshot]:
    """Yield a snapshot of the study every half second until it has ended.

    Raises:
        httpx.TransportError: the service could not be reached for ten minutes.
        ServiceError: the service refused the request, e.g. because the study does not exist.
    """
    last: Snapshot | None = None
    give_up_at = time.monotonic() + _GIVE_UP_SECONDS
    while last is None or last.unreachable or last.study.state not in FINAL_STUDY_STATES:
        try:
            last = _read_snapshot(client, name, last)
            give_up_at = time.monotonic() + _GIVE_UP_SECONDS
        except (httpx.TransportError, ServiceError) as error:
            # The first request fails at once: a wrong URL or name must not wait ten minutes.
            if last is None or not _is_temporary(error) or time.monotonic() > give_up_at:
                raise
            last = Snapshot(study=last.study, running=last.running, unreachable=True)
        yield last
        _wait_for_next_poll(tick)


def _is_temporary(error: httpx.TransportError | ServiceError) -> bool:
    return not isinstance(error, ServiceError) or error.status >= _SERVER_FAULT


def _wait_for_next_poll(tick: Tick) -> None:
    until = time.monotonic() + _POLL_SECONDS
    while time.monotonic() < until:
        tick()
        time.sleep(_TICK_SECONDS)


def _read_snapshot(client: Client, name: str, last: Snapshot | None) -> Snapshot:
    study = StudyView.model_validate(client.get(f"/v1/studies/{name}"))
    items = client.list_items("/v1/runs", study=study.id, state="leased")
    running = tuple(RunView.model_validate(item) for item in reversed(items))
    # A run that ran in the last snapshot and does not run now has ended, or waits for another
    # attempt. Read each: its last line shows the final state and loss.
    running_ids = {run.id for run in running}
    gone = [run.id for run in last.running if run.id not in running_ids] if last else []
    ended = tuple(RunView.model_validate(client.get(f"/v1/runs/{run_id}")) for run_id in gone)
    return Snapshot(study=study, running=running, ended=ended)


@contextmanager
def _print_lines() -> Generator[Show]:
    """Print a line for each run that has ended, and a summary when the counts change."""
    printed = ""

    def show(now: Snapshot) -> None:
        nonlocal printed
        for run in now.ended:
            typer.echo(format_ended_run(run))
        line = (
            "the service cannot be reached; waiting"
            if now.unreachable
            else format_summary(now.study)
        )
        if line != printed:
            typer.echo(line)
            printed = line

    yield show


@contextmanager
def _print_json_lines() -> Generator[Show]:
    """Print a JSON object when a field has changed."""
    printed: dict[str, Any] = {}

    def show(now: Snapshot) -> None:
        nonlocal printed
        # A program gets no line for an unreachable service: the fields have not changed.
        line = make_record(now)
        if line != printed and not now.unreachable:
            typer.echo(json.dumps(line))
            printed = line

    yield show


@contextmanager
def _draw_screen() -> Generator[Show]:
    """Redraw a screen in place."""
    pace = Pace()
    with Live(console=make_console(), refresh_per_second=4) as screen:

        def show(now: Snapshot) -> None:
            if not now.unreachable:
                pace.note_cost(time.monotonic(), now.study.cost_flops)
            screen.update(make_screen(now, pace.estimate_seconds_left(now.study, now.running)))

        yield show


def format_ended_run(run: RunView) -> str:
    """Return a line on a run that no longer runs: its end, or that it waits for another attempt."""
    params = ", ".join(
        f"{name} {format_parameter(value)}" for name, value in sorted(run.params.items())
    )
    where = f"step {run.step}/{run.num_steps}, loss {format_nats(run.val_loss_nats)}"
    return f"  {label_run(run)} {run.state}: {where} ({params})"


def format_summary(study: StudyView) -> str:
    """Return the study's state and progress as a line."""
    return " | ".join([study.state, *list_progress(study)])


def list_progress(study: StudyView) -> list[str]:
    """Return the progress of the search and the targets, in parts."""
    parts = [f"trials: {format_counts(study.trials)}"]
    if study.best_trial is not None:
        best = study.best_trial
        parts.append(f"best {format_nats(best.val_loss_nats)} (trial {best.number})")
    if study.spec.rungs:
        parts.append(f"targets: {format_counts(study.targets)}")
    return parts


def make_record(now: Snapshot) -> dict[str, Any]:
    """Return the fields of a study that change, for programs."""
    fields = {"name", "state", "reason", "trials", "targets", "best_trial", "progress"}
    loss = {"loss_nats", "val_loss_nats"}
    running = [run.model_dump(mode="json", include=_RUN_FIELDS | loss) for run in now.running]
    return now.study.model_dump(mode="json", include=fields | {"cost_flops"}) | {"running": running}


def make_screen(now: Snapshot, eta_seconds: float | None) -> Group:
    """Return the live screen: the study's progress, then a bar for each running run."""
    head = f"{now.study.name} {now.study.state}, {now.study.progress:.0%}"
    if eta_seconds is not None and now.running:
        head += f", about {format_clock(eta_seconds)} left"
    lines = [
        head,
        *list_progress(now.study),
        *(["the service cannot be reached; waiting"] if now.unreachable else []),
    ]
    bars = Table.grid(padding=(0, 2))
    for run in now.running:
        bars.add_row(
            label_run(run),
            _make_bar(run),
            f"{run.step}/{run.num_steps}",
            f"loss {format_nats(run.loss_nats)}",
            f"val {format_nats(run.val_loss_nats)}",
            f"{format_tokens(run.tokens_per_second)} tokens/s",
        )
    return Group(*(Text(line) for line in lines), bars)


def _make_bar(run: RunView) -> ProgressBar:
    return ProgressBar(
        total=run.num_steps,
        completed=run.step,
        width=24,
        complete_style="cyan",
        finished_style="green",
    )


def format_clock(seconds: float) -> str:
    """Return a time as `1:02:03`, or as `2:03` below an hour."""
    minutes, seconds_left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds_left:02}" if hours else f"{minutes}:{seconds_left:02}"
