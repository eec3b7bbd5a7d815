"""`warmscale coord-check`: another process, which has torch, measures; this one draws."""

import argparse
import subprocess
import sys
from pathlib import Path

import typer

from service.cli.common import Exit

DATA, PAGE = "slopes.json", "coord-check.html"


def run_check(arguments: list[str]) -> None:
    """Run `python -m warmcore coord-check`, draw what it wrote, and end with its exit code."""
    parser = argparse.ArgumentParser("warmscale coord-check", add_help=False, allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path("coord-check"))
    out: Path = parser.parse_known_args(arguments)[0].out
    command = [sys.executable, "-m", "warmcore", "coord-check", *arguments]
    code = subprocess.run(command, check=False).returncode  # noqa: S603 - our own command
    asked_for_help = {"--help", "-h"} & set(arguments)
    if code in (Exit.OK, Exit.FAILED) and not asked_for_help:
        typer.echo(f"{write_page(out)} has the plots, {out / DATA} the slopes", err=True)
    raise typer.Exit(code)


def write_page(out: Path) -> Path:
    """Write the page of the check in the folder `out`."""
    from service.results.report.coord_check import render_coord_check
    from warmcore.specs.coord_check import CoordCheck

    found = CoordCheck.model_validate_json((out / DATA).read_bytes())
    path = out / PAGE
    with path.open("wb") as file:
        file.writelines(render_coord_check(found))
    return path
