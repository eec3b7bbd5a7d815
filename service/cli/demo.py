"""`warmscale demo`: a study on real text, from an empty folder to its verdict, with its figures."""

import json
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import typer

from service.cli.common import Exit, connect_client, fail, load_settings
from service.cli.output import tables
from service.cli.output.watch import choose_style, watch_study
from service.cli.spec_file import SpecError, load_spec
from service.cli.study import submit_study
from service.cli.up import print_message
from service.client import Client
from service.local_stack.child_process import ChildError
from service.local_stack.home import HomeInUseError
from service.local_stack.supervisor import Interrupted, PortTakenError, run_stack
from service.results.schemas import StudyResults
from service.runs.schemas import RunView
from service.studies.schemas import TrialView


def run_demo(folder: Path, *, cpus: int, as_json: bool) -> None:
    """Start a stack, run the study of `folder`/spec.yaml, print and save its results, then stop.

    With `as_json`, print the lines of `study watch --json`, then the content of results.json.
    """
    began_at = time.monotonic()
    home = folder / ".warmscale"
    try:
        spec = load_spec(folder / "spec.yaml", Path.cwd())
        # A name with the time: a second demo in the same folder starts a new study.
        spec["name"] = f"{spec['name']}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
        # Port 0, any free port: a stack of the user may already listen on the default port.
        with run_stack(
            load_settings(home, port=0), fleet=["--cpus", str(cpus)], notify=print_message
        ) as running:
            seconds = running.wait_until_ready()
            url = running.access.url
            print_message(f"{url} is ready after {seconds:.1f} s; the fleet is starting")
            with connect_client(home) as client:
                print_message(f"study {spec['name']}")
                submit_study(client, spec)
                # `check_children` restarts the API or the fleet while the study runs.
                ended = watch_study(
                    client, spec["name"], choose_style(as_json=as_json), running.check_children
                )
                completed = ended.state == "completed"
                results = _save_results(client, spec["name"], folder, cpus)
                _print_results(results, as_json=as_json)
    except SpecError as error:
        fail(Exit.USAGE, str(error))
    except (HomeInUseError, PortTakenError) as error:
        fail(Exit.CONFLICT, str(error))
    except ChildError as error:
        fail(Exit.FAILED, str(error))
    except Interrupted:
        fail(Exit.FAILED, "interrupted; the stack is stopped")
    print_message(f"demo: {time.monotonic() - began_at:.0f} s from start to stop")
    if not completed:
        fail(Exit.FAILED, f"the study is {ended.state}: {ended.reason}")


def _save_results(client: Client, name: str, folder: Path, slots: int) -> dict[str, Any]:
    """Write results.json and report.html, and return the content of results.json."""
    results = client.get(f"/v1/studies/{name}/results")
    trials = client.list_items(f"/v1/studies/{name}/trials")
    items = client.list_items("/v1/runs", study=name)
    runs = [RunView.model_validate(item) for item in items]
    report = client.request("GET", f"/v1/studies/{name}/report").text
    (folder / "report.html").write_text(report, encoding="utf-8")
    saved = results | {"trial_list": trials, "fleet": measure_fleet(runs, slots)}
    (folder / "results.json").write_text(json.dumps(saved, indent=2) + "\n", encoding="utf-8")
    print_message(f"written: {folder / 'results.json'}, {folder / 'report.html'}")
    return saved


def _print_results(saved: dict[str, Any], *, as_json: bool) -> None:
    """Print the trials, the verdict and the fleet's figures."""
    if as_json:
        typer.echo(json.dumps(saved))
        return
    views = [TrialView.model_validate(trial) for trial in saved["trial_list"]]
    fields = {name: saved[name] for name in StudyResults.model_fields}
    results = tables.make_results_parts(StudyResults.model_validate(fields))
    tables.print_parts("", tables.make_trials_table(views), "", *results, "")
    _print_fleet_figures(saved["fleet"])


def _print_fleet_figures(figures: dict[str, Any]) -> None:
    share, start = figures["utilization"], figures["slowest_warm_start_seconds"]
    if share is not None:
        typer.echo(f"fleet: {share:.1%} of the time from the first to the last step was training")
    if start is not None:
        typer.echo(f"slowest start of a trial on a warm worker: {start:.2f} s from lease to step")


def measure_fleet(runs: Sequence[RunView], slots: int) -> dict[str, float | None]:
    """Return the fleet's utilization and the slowest start of a trial, in seconds.

    Utilization is a share from 0 to 1: the seconds inside train steps, over `slots` times the
    seconds between the first and the last step of all runs. None: no run has made a step.
    """
    # Example: two slots, a run trains from 0 to 10 s, another from 10 to 20 s. The steps take 20 s
    # of 2 x 20 s: the utilization is 0.5.
    timings = [run.timing for run in runs if run.timing is not None]
    firsts = [t.first_step_at for t in timings if t.first_step_at is not None]
    lasts = [t.last_step_at for t in timings if t.last_step_at is not None]
    starts = [
        run.timing.startup_seconds
        for run in runs
        if run.kind == "trial" and run.timing and run.timing.startup_seconds is not None
    ]
    wall = max(lasts) - min(firsts) if firsts and lasts else 0.0
    inside = sum(timing.train_seconds for timing in timings)
    return {
        "train_seconds": inside,
        "wall_seconds": wall,
        "slots": float(slots),
        "utilization": inside / (slots * wall) if wall > 0 else None,
        "slowest_warm_start_seconds": max(starts, default=None),
    }
