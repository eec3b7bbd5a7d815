"""`warmscale study` and `warmscale run`: commands that need a running service."""

import json
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.cli import study_start
from service.cli.common import (
    Exit,
    Home,
    Json,
    Project,
    StudyName,
    connect_client,
    fail,
    quote_name,
)
from service.local_stack.home import DEFAULT_HOME

if TYPE_CHECKING:
    from service.client import Client

# The largest page that the API returns.
_PAGE = 200
study = typer.Typer(
    help="Studies: create, watch, show, pause, resume, cancel.", no_args_is_help=True
)
run = typer.Typer(help="Runs: each is a single training.", no_args_is_help=True)
study.command()(study_start.enqueue)
study.command()(study_start.targets)


@study.command()
def create(
    *,
    spec: Annotated[Path, typer.Option("--file", "-f", help="The study's spec, YAML or JSON.")],
    name: Annotated[
        str | None, typer.Option(help="A name that replaces the name in the file.")
    ] = None,
    project: Project = None,
    home: Home = DEFAULT_HOME,
    as_json: Json = False,
) -> None:
    """Submit a study. A relative data.source starts at the working directory."""
    from service.cli.spec_file import SpecError, load_spec  # reads YAML

    try:
        body = load_spec(spec, Path.cwd())
    except SpecError as error:
        fail(Exit.USAGE, str(error))
    with connect_client(home, project) as client:
        created = submit_study(client, body | ({"name": name} if name else {}))
    # On stderr: a script reads the study's id from stdout.
    for warning in created["warnings"]:
        typer.echo(f"warning: {warning}", err=True)
    typer.echo(json.dumps(created) if as_json else f"{created['name']} ({created['id']})")


def submit_study(client: "Client", spec: dict[str, Any]) -> dict[str, Any]:
    """Submit a study under a new idempotency key: a retry creates no second study."""
    return client.post("/v1/studies", spec, idempotency_key=str(uuid.uuid4()))


@study.command(name="list")
def list_studies(
    *,
    limit: Annotated[int, typer.Option(min=1, help="The largest number of studies to list.")] = 50,
    project: Project = None,
    home: Home = DEFAULT_HOME,
    as_json: Json = False,
) -> None:
    """List studies, newest first."""
    from service.cli.output import tables
    from service.studies.schemas import StudyView

    with connect_client(home, project) as client:
        studies = client.list_items("/v1/studies", first=limit, limit=min(limit, _PAGE))
    if as_json:
        typer.echo(json.dumps(studies))
    else:
        tables.print_parts(
            tables.make_studies_table([StudyView.model_validate(s) for s in studies])
        )


@study.command()
def show(
    name: StudyName, *, project: Project = None, home: Home = DEFAULT_HOME, as_json: Json = False
) -> None:
    """Show a study: state, counts, best trial, progress, cost so far."""
    from service.cli.output import tables
    from service.studies.schemas import StudyView, TrialView

    with connect_client(home, project) as client:
        found = client.get(f"/v1/studies/{quote_name(name)}")
        trials = client.list_items(f"/v1/studies/{quote_name(name)}/trials")
    if as_json:
        typer.echo(json.dumps(found | {"trial_list": trials}))
        return
    views = [TrialView.model_validate(trial) for trial in trials]
    tables.print_parts(
        tables.make_study_grid(StudyView.model_validate(found)), tables.make_trials_table(views)
    )


@study.command()
def watch(
    name: StudyName, *, project: Project = None, home: Home = DEFAULT_HOME, as_json: Json = False
) -> None:
    """Show the progress of a study until it ends. Ctrl-C leaves the study as it is."""
    from service.cli.output import watch as watching

    try:
        # `watch_study` retries by itself and shows that it waits, so the client must not retry.
        with connect_client(home, project, patience_seconds=0) as client:
            style = watching.choose_style(as_json=as_json)
            ended = watching.watch_study(client, quote_name(name), style)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None  # 128 + SIGINT, as shells do
    if ended.state != "completed":
        raise typer.Exit(Exit.FAILED)


@study.command()
def results(
    *,
    name: StudyName,
    html: Annotated[Path | None, typer.Option(help="Save the report, an HTML page, here.")] = None,
    project: Project = None,
    home: Home = DEFAULT_HOME,
    as_json: Json = False,
) -> None:
    """Show a study's results: the verdict, its runs and their costs."""
    from service.cli.output import tables
    from service.results.schemas import StudyResults

    with connect_client(home, project) as client:
        found = client.get(f"/v1/studies/{quote_name(name)}/results")
        page = client.request("GET", f"/v1/studies/{quote_name(name)}/report").text if html else ""
    # Save the page first: a study without a verdict has a report too, and exits with code 1.
    if html:
        _save_report(html, page)
    if as_json:
        typer.echo(json.dumps(found))
    else:
        tables.print_parts(*tables.make_results_parts(StudyResults.model_validate(found)))
    if found["verdict"] is None:
        raise typer.Exit(Exit.FAILED)


def _save_report(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        fail(Exit.USAGE, f"{path}: {error.strerror}")
    typer.echo(f"report: {path}", err=True)


@study.command()
def pause(name: StudyName, *, project: Project = None, home: Home = DEFAULT_HOME) -> None:
    """Stop leasing runs of a study; running trials continue to their end."""
    _change_state(home, project, name, "pause")


@study.command()
def resume(name: StudyName, *, project: Project = None, home: Home = DEFAULT_HOME) -> None:
    """Lease runs of a paused study again."""
    _change_state(home, project, name, "resume")


@study.command()
def cancel(name: StudyName, *, project: Project = None, home: Home = DEFAULT_HOME) -> None:
    """End a study; a running trial stops at its next report."""
    _change_state(home, project, name, "cancel")


def _change_state(home: Path, project: str | None, name: str, verb: str) -> None:
    with connect_client(home, project) as client:
        # To pause a paused study changes nothing, so a retry is safe.
        changed = client.post(f"/v1/studies/{quote_name(name)}/{verb}", retry=True)
    typer.echo(f"{changed['name']} is {changed['state']}")


@run.command(name="show")
def show_run(
    *,
    run_id: Annotated[str, typer.Argument(metavar="RUN", help="A run's id, run_….")],
    project: Project = None,
    home: Home = DEFAULT_HOME,
    as_json: Json = False,
) -> None:
    """Show a run: state, progress, parameters, checkpoints, error."""
    from service.cli.output import tables
    from service.runs.schemas import CheckpointView, RunView

    with connect_client(home, project) as client:
        found = client.get(f"/v1/runs/{quote_name(run_id)}")
        checkpoints = client.get(f"/v1/runs/{quote_name(run_id)}/checkpoints")["items"]
    if as_json:
        typer.echo(json.dumps(found | {"checkpoints": checkpoints}))
        return
    views = [CheckpointView.model_validate(checkpoint) for checkpoint in checkpoints]
    tables.print_parts(*tables.make_run_parts(RunView.model_validate(found), views))
