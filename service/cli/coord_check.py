"""`warmscale coord-check`: a second process with torch measures, this process draws the page."""

import argparse
import subprocess
import sys
from pathlib import Path

import typer

from service.cli.common import Exit

DATA, PAGE = "slopes.json", "coord-check.html"


def run_check(arguments: list[str]) -> None:
    """Run `python -m warmcore coord-check`, write a page of its slopes, exit with its exit code."""
    # Read --out alone: the second process parses all arguments, and prints its own --help.
    parser = argparse.ArgumentParser("warmscale coord-check", add_help=False, allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path("coord-check"))
    out: Path = parser.parse_known_args(arguments)[0].out
    command = [sys.executable, "-m", "warmcore", "coord-check", *arguments]
    code = subprocess.run(command, check=False).returncode  # noqa: S603 - our own command
    # Exit codes 0 (flat) and 1 (not flat) mean that the slopes were written; 2 is a bad spec.
    asked_for_help = {"--help", "-h"} & set(arguments)
    if code in (Exit.OK, Exit.FAILED) and not asked_for_help:
        typer.echo(f"{write_page(out)} has the plots, {out / DATA} the slopes", err=True)
    raise typer.Exit(code)


def write_page(out: Path) -> Path:
    """Write the page of plots beside the slopes in the folder `out`, and return its path."""
    from service.results.report.coord_check import render_coord_check
    from warmcore.specs.coord_check import CoordCheck

    slopes = CoordCheck.model_validate_json((out / DATA).read_bytes())
    path = out / PAGE
    with path.open("wb") as file:
        file.writelines(render_coord_check(slopes))
    return path
