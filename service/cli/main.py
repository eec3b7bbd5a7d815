"""The command line `warmscale …`: its top commands, and the groups of the other modules.

Commands import their modules when they run: `--help` and shell completion must answer at once.
"""

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
    help="Tune on small proxy models, grow the best checkpoint, train the target, and report "
    f"whether growing was worth its cost.\n\n{EXIT_CODES}",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
# Typer lists the commands in the order of their registration.
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
Port = Annotated[int | None, typer.Option(help="Port of the API; 0: any free port.")]
Cpus = Annotated[int | None, typer.Option(min=1, help="CPUs for training; all CPUs by default.")]


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
    """Start database, API and fleet on this machine. Ctrl-C stops them; the next start resumes."""
    from service.cli import up as cli_up

    # None starts no fleet; an empty list starts a fleet with its default options.
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
    """Start the API alone; `warmscale db upgrade` must have prepared its database."""
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
    """Start a fleet, which trains the runs that the service leases. Options: `fleet --help`."""
    # The fleet parses its own options. This process finds the service's URL and key, because
    # `workers.fleet` reads no home folder. --help needs no key.
    arguments = list(context.args)
    environment = dict(os.environ)
    if not {"--help", "-h"} & set(arguments):
        parser = argparse.ArgumentParser("warmscale fleet", add_help=False, allow_abbrev=False)
        parser.add_argument("--url")
        given, others = parser.parse_known_args(arguments)
        found = find_access(home, url=given.url)
        environment["WARMSCALE_API_KEY"] = found.key
        arguments = ["--url", found.url, *others]
    # Before exec: the kernel keeps the request to end with the parent for the new program.
    if supervised:
        from service.local_stack.child_process import die_with_parent

        die_with_parent()
    command = [sys.executable, "-m", "workers.fleet", *arguments]
    os.execve(command[0], command, environment)  # noqa: S606 - our own command


@app.command()
def demo(
    *,
    folder: Annotated[
        Path, typer.Option(help="Folder of spec.yaml, results.json and report.html.")
    ] = Path("demo"),
    cpus: Annotated[int, typer.Option(min=1, help="CPUs for training.")] = 2,
    as_json: Json = False,
) -> None:
    """Run a small study on real text from its start to its verdict, in minutes."""
    from service.cli import demo as demonstration

    demonstration.run_demo(folder, cpus=cpus, as_json=as_json)


@app.command(name="export")
def export_model(
    *,
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="A run's id, or the folder of a checkpoint or run.")
    ],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    output_format: Annotated[
        Literal["hf"], typer.Option("--format", help="hf: a folder for transformers.")
    ] = "hf",
    weights: Annotated[
        Literal["raw", "ema", "swa"], typer.Option(help="The last weights, or an average.")
    ] = "raw",
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option(help="The type of the weights.")
    ] = "float32",
    max_shard_bytes: Annotated[
        int | None, typer.Option(min=1, help="Largest file of weights; 5 GB by default.")
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
    """Convert a Llama, Mistral or Qwen2 to a base checkpoint; print the fields for a spec."""
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
    """Check that activations do not depend on width or depth; write slopes and a page of plots."""
    from service.cli import coord_check as cli_coord

    cli_coord.run_check(list(context.args))


def main() -> None:
    """Run the command line. A traceback means a bug: errors of a user print a message."""
    try:
        app(prog_name="warmscale")
    except BrokenPipeError:
        # The reader of a pipe has exited, for example in `warmscale study list | head`. At exit
        # Python flushes stdout and would print an error: point stdout to /dev/null before that.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(Exit.FAILED)


if __name__ == "__main__":
    main()
