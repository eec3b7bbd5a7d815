"""`python -m benchmarks.chaos --seed 1 --minutes 20`: random faults on a whole installation.

Exit 0: no trial was lost or counted twice, and `warmscale db check` found nothing. The same seed
gives the same schedule of (time, kind, victim). The program ends every process that it starts.
"""

import argparse
import dataclasses
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType
from typing import Any

from benchmarks.chaos import report
from benchmarks.chaos.driver import STUDY_SECONDS, Driver
from benchmarks.chaos.schedule import plan_faults
from benchmarks.chaos.stack import ChaosError, Stack

_START_SECONDS = 180.0


def main() -> int:
    args = _make_parser().parse_args()
    os.environ["TZ"] = "UTC"
    time.tzset()
    seconds = args.minutes * 60
    schedule = plan_faults(args.seed, seconds=seconds, gap_seconds=args.gap)
    for fault in schedule:
        print(json.dumps(dataclasses.asdict(fault)), flush=True)
    if args.plan:
        return 0
    signal.signal(signal.SIGALRM, _raise_out_of_time)
    signal.signal(signal.SIGTERM, _raise_out_of_time)
    # A hang must not outlive the run: the alarm raises in the main thread, and the stack is closed.
    signal.alarm(int(_START_SECONDS + seconds + STUDY_SECONDS))
    # The path must be short: Ray puts sockets below it, and a socket's path has at most 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    print(json.dumps({"folder": str(folder)}), flush=True)
    folder.chmod(0o755)  # under root PostgreSQL runs as another user
    stack = Stack(folder=folder, fsync=not args.no_fsync)
    driver = Driver(
        stack=stack,
        schedule=schedule,
        seconds=seconds,
        spec=make_spec(folder, trials=args.trials, seeds=args.targets),
    )
    started = time.monotonic()
    try:
        stack.open()
        if not stack.disk.can_fill:
            print("fill-disk needs root to mount a tmpfs: it is skipped", flush=True)
        driver.run()
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - the stack is closed below after any error
        driver.errors.append(f"{type(error).__name__}: {error}")
        print(driver.errors[-1], flush=True)
    try:
        stack.database.wait_ready()  # a fault may have stopped it
        summary = report.summarize_run(
            driver, seed=args.seed, minutes=(time.monotonic() - started) / 60
        )
        if driver.errors:
            print(driver.format_evidence(), flush=True)
    finally:
        signal.alarm(0)
        stack.close()
        if not driver.errors or not args.keep:
            shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(summary))
    print(report.format_row(summary))
    if args.append is not None:
        report.append_row(args.append, report.format_row(summary))
    return 1 if driver.errors else 0


def make_spec(folder: Path, *, trials: int, seeds: int) -> dict[str, Any]:
    """Make a spec of trials of about a second, then a target, warm and cold on each seed."""
    corpus = folder / "corpus"
    corpus.mkdir()
    for i in range(40):
        lines = [f"document {i} line {j}: {i * j} is {i} times {j}\n" for j in range(40)]
        (corpus / f"{i:02d}.txt").write_text("".join(lines))
    return {
        "data": {"source": str(corpus), "context": 32},
        "proxy": {"width": 16, "depth": 1, "head_dim": 16},
        "target": {"width": 32, "train": {"num_tokens": 4 * 32 * 300}},
        "train": {
            "batch_size": 4, "num_tokens": 4 * 32 * 200, "evaluations": 4, "eval_tokens": 1024,
            "log_every": 5,
        },
        "search_space": {"lr": {"type": "float", "low": 1e-3, "high": 3e-2, "log": True}},
        "hpo": {"trials": trials, "parallel": 4, "sampler": "tpe", "pruner": "median"},
        "warmstart": {"seeds": seeds},
        "max_attempts": 10,
    }  # fmt: skip


def _raise_out_of_time(number: int, _frame: FrameType | None) -> None:
    raise ChaosError(f"out of time (signal {number})")


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--trials", type=int, default=60, help="trials of each study")
    parser.add_argument("--targets", type=int, default=2, help="seeds of each study's target")
    parser.add_argument("--gap", type=float, default=5.0, help="seconds between faults, on average")
    parser.add_argument("--plan", action="store_true", help="print the schedule and exit")
    parser.add_argument("--no-fsync", action="store_true", help="start the database without fsync")
    parser.add_argument("--keep", action="store_true", help="keep the folder after a failure")
    parser.add_argument("--append", type=Path, help="a Markdown page to which the row is added")
    return parser


if __name__ == "__main__":
    sys.exit(main())
