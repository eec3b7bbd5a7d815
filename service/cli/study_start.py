"""`warmscale study enqueue` and `study targets`: what a user starts by hand in a study."""

import json
import uuid
from pathlib import Path
from typing import Annotated, Any

import typer

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

Key = Annotated[
    str | None,
    typer.Option(
        "--idempotency-key",
        help="The same key starts nothing twice; one of its own when not given.",
    ),
]


def enqueue(
    study: StudyName,
    params: Annotated[
        list[str], typer.Argument(metavar="NAME=VALUE…", help="The others are sampled.")
    ],
    *,
    key: Key = None,
    project: Project = None,
    home: Home = DEFAULT_HOME,
    as_json: Json = False,
) -> None:
    """Try given parameters next: `warmscale study enqueue my-study lr=0.003 beta2=0.95`."""
    body = {"params": _parse_params(params)}
    trial = _post_once(home, project, f"/v1/studies/{quote_name(study)}/trials", body, key)
    if as_json:
        typer.echo(json.dumps(trial))
    else:
        given = ", ".join(f"{name} {value}" for name, value in trial["params"].items())
        typer.echo(f"trial {trial['number']} is {trial['state']} with {given}")


def targets(
    study: StudyName,
    *,
    width: Annotated[int | None, typer.Option(help="Of the target.")] = None,
    depth: Annotated[
        int | None, typer.Option(help="Of the target; the base's if not given.")
    ] = None,
    trial: Annotated[int | None, typer.Option(help="To grow; the best if not given.")] = None,
    checkpoint: Annotated[int | None, typer.Option(help="To grow, by its id.")] = None,
    base: Annotated[
        Path | None, typer.Option(help="To grow: what `warmscale import --json` printed.")
    ] = None,
    request: Annotated[
        Path | None,
        typer.Option("--file", "-f", help="YAML with `target` and, if need be, `warmstart`."),
    ] = None,
    key: Key = None,
    project: Project = None,
    home: Home = DEFAULT_HOME,
    as_json: Json = False,
) -> None:
    """Start a warmstart by hand, warm runs and cold ones, beside the one that ends the study."""
    body = _load_mapping(request) if request else {}
    given = {
        "trial": trial,
        "checkpoint": checkpoint,
        "base": _load_mapping(base) if base else None,
    }
    body |= {name: value for name, value in given.items() if value is not None}
    sizes = {"width": width, "depth": depth}
    target = body.get("target", {})
    if isinstance(target, dict):  # else the service says what it should be
        body["target"] = target | {name: size for name, size in sizes.items() if size is not None}
    runs = _post_once(home, project, f"/v1/studies/{quote_name(study)}/targets", body, key)
    if as_json:
        typer.echo(json.dumps(runs))
        return
    for run in runs["items"]:
        typer.echo(f"{run['id']}  {run['arm']}  seed {run['seed']}  {run['state']}")


def _parse_params(given: list[str]) -> dict[str, Any]:
    params: dict[str, Any] = {}
    for text in given:
        name, is_pair, value = text.partition("=")
        if not (name and is_pair):
            fail(Exit.USAGE, f"params: NAME=VALUE, such as lr=0.003 (got {text!r})")
        if name in params:
            fail(Exit.USAGE, f"params.{name}: give it once (got {params[name]!r} and {value!r})")
        params[name] = _parse_value(name, value)
    return params


def _parse_value(name: str, text: str) -> Any:
    """A number, true or false; else the text itself, which may be a choice."""

    def refused(constant: str) -> Any:
        fail(Exit.USAGE, f"params.{name}: finite numbers work (got {constant!r})")

    try:
        return json.loads(text, parse_constant=refused)
    except ValueError:
        return text


def _load_mapping(path: Path) -> dict[str, Any]:
    from service.cli.spec_file import SpecError, load_spec  # reads YAML

    try:
        return load_spec(path, Path.cwd())
    except SpecError as error:
        fail(Exit.USAGE, str(error))


def _post_once(
    home: Path, project: str | None, path: str, body: dict[str, Any], key: str | None
) -> dict[str, Any]:
    """The answer; where none came, how to ask again without starting it twice."""
    chosen = key or str(uuid.uuid4())
    try:
        with connect_client(home, project) as client:
            return client.post(path, body, idempotency_key=chosen)
    except typer.Exit as end:
        if end.exit_code == Exit.UNREACHABLE:
            again = f"--idempotency-key {chosen}"
            typer.echo(f"it may have been done; to repeat it, never twice: {again}", err=True)
        raise
