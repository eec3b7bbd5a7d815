"""The command `python -m warmcore run.yaml`: a run without a service, and its branches.

It writes `measurements.jsonl` and checkpoints below `--out`, and continues from the newest good
checkpoint in that folder. The curve has a line per evaluation and per `log_every` steps, in the
order of events. A branch has the same files in a folder of its own (`tpp-5` at 5 tokens per
parameter); its curve begins at its trunk's checkpoint. `python -m warmcore coord-check run.yaml` is
in `warmcore.coord_check.cli`.

Exit codes: 0 finished, 2 bad spec, 3 diverged, 130 interrupted (run it again to continue).
"""

import argparse
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import torch

from warmcore.coord_check import cli
from warmcore.local_run import RunLocation, run_spec_file
from warmcore.specs import Strategy
from warmcore.training.launch import LaunchOptions, lead_processes
from warmcore.training.ranks import ALONE


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the arguments, run the command, and return the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    # `coord-check` has a parser of its own: it shares few options with a run.
    if arguments[:1] == ["coord-check"]:
        return cli.main(arguments[1:])
    options = _make_parser().parse_args(arguments)
    location = RunLocation(
        out=options.out or Path("runs") / options.spec.stem,
        checkpoint_seconds=options.checkpoint_seconds,
    )
    # A partial of a module's function: other processes receive it by pickle.
    run = functools.partial(run_spec_file, options.spec, location)
    if options.processes > 1:
        launch = LaunchOptions(
            size=options.processes,
            strategy=options.strategy,
            device=options.device,
            num_threads=options.threads,
        )
        return lead_processes(run, launch)
    # With several processes, `lead_processes` sets the threads of each.
    if options.threads:
        torch.set_num_threads(options.threads)
    return run(ALONE, options.device)


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m warmcore", description="Train one run.")
    parser.add_argument("spec", type=Path, help="run.yaml, see examples/run.yaml")
    parser.add_argument("--out", type=Path, help="folder to write to (runs/<name of the spec>)")
    parser.add_argument("--threads", type=int, help="CPU threads (torch's default)")
    parser.add_argument("--checkpoint-seconds", type=float, default=60.0, help="default 60")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="default cpu")
    parser.add_argument(
        "--processes", type=_parse_count, default=1, help="that share the run; default 1"
    )
    parser.add_argument(
        "--strategy",
        default="ddp",
        choices=get_args(Strategy),
        help="of several processes; default ddp",
    )
    return parser


def _parse_count(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


if __name__ == "__main__":
    sys.exit(main())
