"""`warmscale study enqueue` and `study targets`: trials and targets that a user starts by hand."""

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
        help="A repeated command with the same key starts nothing; a new key by default.",
    ),
]


def enqueue(
    study: StudyName,
    params: Annotated[
        list[str], typer.Argument(metavar="NAME=VALUE…", help="Other parameters are sampled.")
    ],
    *,
    key: Key = None,
    project: Project = None,
    home: Home = DEFAULT_HOME,
    as_json: Json = False,
) -> None:
    """Use given parameters for the next trial: `study enqueue my-study lr=0.003 beta2=0.95`."""
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
    width: Annotated[int | None, typer.Option(help="Width of the target.")] = None,
    depth: Annotated[
        int | None, typer.Option(help="Depth of the target; the base's by default.")
    ] = None,
    trial: Annotated[
        int | None, typer.Option(help="Number of the trial to grow; the best by default.")
    ] = None,
    checkpoint: Annotated[int | None, typer.Option(help="Id of the checkpoint to grow.")] = None,
    base: Annotated[
        Path | None, typer.Option(help="JSON of `warmscale import --json`, a base to grow.")
    ] = None,
    request: Annotated[
        Path | None,
        typer.Option("--file", "-f", help="YAML with `target`, and optionally `warmstart`."),
    ] = None,
    key: Key = None,
    project: Project = None,
    home: Home = DEFAULT_HOME,
    as_json: Json = False,
) -> None:
    """Start targets by hand, warm and cold runs, besides the targets that the study starts."""
    # Options override fields of the file. Example: `-f request.yaml --width 64` takes the training
    # of the target from the file and the width from the option.
    body = _load_mapping(request) if request else {}
    given = {
        "trial": trial,
        "checkpoint": checkpoint,
        "base": _load_mapping(base) if base else None,
    }
    body |= {name: value for name, value in given.items() if value is not None}
    sizes = {"width": width, "depth": depth}
    target = body.get("target", {})
    if isinstance(target, dict):  # otherwise the service refuses it and names the right type
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
    """Return a number or a boolean; any other text stays text, for example a choice's name."""

    # Python's JSON parser accepts NaN and Infinity, which the API cannot take.
    def refuse_constant(constant: str) -> Any:
        fail(Exit.USAGE, f"params.{name}: finite numbers work (got {constant!r})")

    # Example: `lr=3e-3` is a number, `tied=true` a boolean, and `schedule=cosine` text.
    try:
        return json.loads(text, parse_constant=refuse_constant)
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
    """Post under an idempotency key and return the response.

    Without a response, prints the option that repeats the command without a second effect.
    """
    # Example: the service starts the targets, and the connection breaks before its response. The
    # user repeats the command with the printed key, and the service returns the same targets.
    chosen = key or str(uuid.uuid4())
    try:
        with connect_client(home, project) as client:
            return client.post(path, body, idempotency_key=chosen)
    except typer.Exit as end:
        if end.exit_code == Exit.UNREACHABLE:
            again = f"--idempotency-key {chosen}"
            typer.echo(
                f"the service may have done this; to repeat it without a second effect: {again}",
                err=True,
            )
        raise
