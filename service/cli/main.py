"""The command line: `warmscale …`. Commands import what they need, so that help comes at once."""

import argparse
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from service.cli import study
from service.cli.admin import audit_log, checkpoints, database, keys, webhooks
from service.cli.common import EXIT_CODES, Exit, Home, Json, find_access, load_settings
from service.local_stack.home import DEFAULT_HOME

app = typer.Typer(
    name="warmscale",
    help="Tune on small proxy models, grow the best checkpoint, train the target, and tell whether "
    f"growing paid.\n\n{EXIT_CODES}",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(study.study, name="study")
app.add_typer(study.run, name="run")
for command in (
    database.current,
    database.history,
    database.downgrade,
    database.backup,
    database.restore,
):
    database.db.command()(command)
database.db.command()(audit_log.events)
app.add_typer(database.db, name="db")
app.add_typer(keys.key, name="key")
app.add_typer(checkpoints.checkpoints, name="checkpoints")
app.add_typer(webhooks.webhook, name="webhook")

Supervised = Annotated[bool, typer.Option("--supervised", hidden=True)]
Port = Annotated[int | None, typer.Option(help="Port of the API; 0 takes any free one.")]
Cpus = Annotated[int | None, typer.Option(min=1, help="CPUs for training; all when not given.")]


def _print_version(value: bool) -> None:  # noqa: FBT001 - typer's callback
    if value:
        from service import __version__

        typer.echo(f"warmscale {__version__}")
        raise typer.Exit


@app.callback()
def options(
    *,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Options of the program itself."""


@app.command()
def up(
    *,
    home: Home = DEFAULT_HOME,
    port: Port = None,
    fleet: Annotated[bool, typer.Option(help="Start a fleet on this machine.")] = True,
    cpus: Cpus = None,
    as_json: Json = False,
) -> None:
    """Start database, API and fleet on this machine. Ctrl-C stops them; everything resumes."""
    from service.cli import up as cli_up

    fleet_options = [*(["--cpus", str(cpus)] if cpus else [])] if fleet else None
    cli_up.run_stack_until_stopped(load_settings(home, port=port), fleet_options, as_json=as_json)


@app.command()
def serve(
    *,
    home: Home = DEFAULT_HOME,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Port = None,
    supervised: Supervised = False,
) -> None:
    """Start the API alone, on a database that `warmscale db upgrade` has prepared."""
    from service.cli import serve

    serve.run_api(load_settings(home, host=host, port=port), supervised=supervised)


@app.command(
    context_settings={
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "help_option_names": [],
    }
)
def fleet(
    context: typer.Context, *, home: Home = DEFAULT_HOME, supervised: Supervised = False
) -> None:
    """Start a fleet, which trains what the service leases. `fleet --help` has its options."""
    arguments = list(context.args)
    environment = dict(os.environ)
    if not {"--help", "-h"} & set(arguments):
        parser = argparse.ArgumentParser("warmscale fleet", add_help=False, allow_abbrev=False)
        parser.add_argument("--url")
        given, others = parser.parse_known_args(arguments)
        found = find_access(home, url=given.url)
        environment["WARMSCALE_API_KEY"] = found.key
        arguments = ["--url", found.url, *others]
    if supervised:
        from service.local_stack.child_process import die_with_parent

        die_with_parent()
    command = [sys.executable, "-m", "workers.fleet", *arguments]
    os.execve(command[0], command, environment)  # noqa: S606 - the fleet takes this process over


@app.command()
def demo(
    *,
    folder: Annotated[
        Path, typer.Option(help="Has spec.yaml; gets results.json and report.html.")
    ] = Path("demo"),
    cpus: Annotated[int, typer.Option(min=1, help="CPUs for training.")] = 2,
    as_json: Json = False,
) -> None:
    """Run a small study on real text from nothing to its verdict, in minutes."""
    from service.cli import demo as demonstration

    demonstration.run_demo(folder, cpus=cpus, as_json=as_json)


@app.command(name="export")
def export_model(
    *,
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="A run's id, or a folder: a checkpoint, a run.")
    ],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    output_format: Annotated[
        Literal["hf"], typer.Option("--format", help="hf: transformers loads it.")
    ] = "hf",
    weights: Annotated[
        Literal["raw", "ema", "swa"], typer.Option(help="The last ones, or an average of them.")
    ] = "raw",
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option(help="Of the weights.")
    ] = "float32",
    max_shard_bytes: Annotated[
        int | None, typer.Option(min=1, help="Of a file of weights; 5 GB when not given.")
    ] = None,
    home: Home = DEFAULT_HOME,
    as_json: Json = False,
) -> None:
    """Write a trained model as a Hugging Face folder, its tokenizer included."""
    from service.cli import convert

    assert output_format == "hf"
    options = ["--out", str(out), "--weights", weights, "--dtype", dtype]
    options += ["--max-shard-bytes", str(max_shard_bytes)] if max_shard_bytes else []
    convert.export_checkpoint(run, home, options, as_json=as_json)


@app.command(name="import")
def import_model(
    *,
    folder: Annotated[Path, typer.Argument(metavar="PATH", help="A Hugging Face folder.")],
    out: Annotated[str, typer.Option(help="The checkpoint to write: a folder, or a URI.")],
    as_json: Json = False,
) -> None:
    """Make a Llama, Mistral or Qwen2 a base checkpoint to grow; print what a spec takes."""
    from service.cli import convert

    convert.import_folder(folder, ["--out", out], as_json=as_json)


@app.command(
    "coord-check",
    context_settings={
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "help_option_names": [],
    },
)
def coord_check(context: typer.Context) -> None:
    """Check that activations depend on neither width nor depth: slopes and a page of plots."""
    from service.cli import coord_check as cli_coord

    cli_coord.run_check(list(context.args))


def main() -> None:
    """Run the command line; a fault of ours shows its trace, a user's never does."""
    try:
        app(prog_name="warmscale")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(Exit.FAILED)


if __name__ == "__main__":
    main()
