"""The command `python -m warmcore coord-check run.yaml`: slopes over sizes, in slopes.json.

Exit codes: 0 all slopes are within the tolerance, 1 a slope is not, 2 bad spec.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import torch

from warmcore.checkpoint.checkpoint import CheckpointCorruptError
from warmcore.coord_check.check import CheckSetup, check_axis
from warmcore.corpus.prepare import prepare_corpus
from warmcore.run_file import read_spec
from warmcore.specs import ModelSpec, OptimizerName, Parametrization, RunSpec, TrainSpec
from warmcore.specs.coord_check import KINDS, TOLERANCE, AxisCheck, CoordCheck

log = logging.getLogger("warmcore")

FLAT, NOT_FLAT, BAD_SPEC = 0, 1, 2
FILE = "slopes.json"
# Below width 128 and below depth 4, effects of finite size are still 5 % of an activation.
WIDTHS, DEPTHS = (128, 256, 512), (4, 8, 16, 32)


def main(arguments: Sequence[str]) -> int:
    """Parse the arguments, check the model, write the slopes, and return the exit code."""
    options = _make_parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        check = check_run_model(read_spec(options.spec), options)
    except (ValueError, CheckpointCorruptError) as error:
        log.error("%s", error)  # noqa: TRY400 - a message for the user, not a traceback
        return BAD_SPEC
    content = check.model_dump_json(indent=2)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / FILE).write_text(content)
    print(content if options.json else format_table(check))  # noqa: T201 - this is the output
    return FLAT if check.is_flat else NOT_FLAT


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="coord-check",
        description="Check that activations keep their size as the model grows: train the run's "
        "model at several widths and depths for a few steps. Exit codes: 0 flat, 1 not flat, "
        "2 bad spec.",
    )
    add = parser.add_argument
    add("spec", type=Path, help="run.yaml, see examples/run.yaml")
    add("--out", type=Path, default=Path("coord-check"), help=f"folder for {FILE}")
    add("--widths", type=_parse_sizes, default=WIDTHS, help="default 128,256,512; none: no check")
    add("--depths", type=_parse_sizes, default=DEPTHS, help="default 4,8,16,32; none: no check")
    add("--steps", type=_parse_positive, default=5, help="steps before the slopes; default 5")
    add("--seeds", type=_parse_positive, default=4, help="seeds to average over; default 4")
    add("--optimizer", choices=get_args(OptimizerName), help="default: the run's")
    add("--parametrization", choices=get_args(Parametrization), help="default: the run's")
    add("--lr", type=float, help="default: the run's")
    add(
        "--batch-size", type=_parse_positive, default=8, help="sequences; default 8: few are enough"
    )
    add("--context", type=_parse_positive, default=32, help="tokens; default 32: few are enough")
    add("--tolerance", type=float, default=TOLERANCE, help="largest flat slope; default 0.05")
    add("--threads", type=int, help="CPU threads (torch's default)")
    add("--device", default="cpu", help="default cpu")
    add("--json", action="store_true", help=f"print {FILE} instead of a table")
    return parser


def _parse_sizes(text: str) -> tuple[int, ...]:
    if text == "none":
        return ()
    sizes = tuple(sorted({_parse_positive(part) for part in text.split(",")}))
    if len(sizes) == 1:
        raise argparse.ArgumentTypeError(f"{text} is a single size; a slope needs two, or none")
    return sizes


def _parse_positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return number


def check_run_model(run: RunSpec, options: argparse.Namespace) -> CoordCheck:
    """Check the run's model, after the changes in `options`.

    Raises:
        ValueError: the model or the training cannot have an option or a size.
    """
    if not options.widths and not options.depths:
        raise ValueError("widths and depths are both none; give sizes for either")
    model = ModelSpec.model_validate(
        run.model.model_dump() | _list_given(options, "parametrization")
    )
    changed = _list_given(options, "optimizer", "lr", "batch_size")
    train = TrainSpec.model_validate(run.train.model_dump() | changed)
    # Short sequences and small batches suffice: the sizes are means over many activations.
    setup = CheckSetup(
        tokens=prepare_corpus(run.data).train,
        train=train,
        context=options.context,
        num_steps=options.steps,
        num_seeds=options.seeds,
        device=options.device,
    )
    # The base sizes come from the run, and each axis keeps the run's size on the other axis.
    axes: list[AxisCheck] = []
    if options.widths:
        axes.append(check_axis(setup, model, "width", options.widths))
    if options.depths:
        axes.append(check_axis(setup, model, "depth", options.depths))
    return CoordCheck(
        model=model,
        train=train,
        context=options.context,
        num_steps=options.steps,
        num_seeds=options.seeds,
        tolerance=options.tolerance,
        axes=tuple(axes),
    )


def _list_given(options: argparse.Namespace, *names: str) -> dict[str, object]:
    return {name: value for name in names if (value := getattr(options, name)) is not None}


def format_table(check: CoordCheck) -> str:
    """Return the slopes after the last step, a line per kind, with a mark at steep slopes."""
    # Example of a line: "attention        +0.012 pass   -0.081 FAIL".
    lines = ["".join(["kind".ljust(14), *(f"{axis.axis:>14}" for axis in check.axes)])]
    for kind in KINDS:
        cells: list[str] = []
        for axis in check.axes:
            beyond = kind in axis.find_steep_kinds(check.tolerance)
            cells.append(f"{axis.last_slopes[kind]:+.3f} {'FAIL' if beyond else 'pass'}".rjust(14))
        lines.append(kind.ljust(14) + "".join(cells))
    verdict = "flat" if check.is_flat else "not flat"
    lines.append(
        f"{verdict}: slopes of log mean |x| after {check.num_steps} steps, tolerance "
        f"{check.tolerance:g} ({check.train.optimizer}, {check.model.parametrization})"
    )
    return "\n".join(lines)
