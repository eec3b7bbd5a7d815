"""Training throughput and memory against transformers' LlamaForCausalLM, in the same run.

Same shapes, batch, optimizer (fused AdamW), clipping, threads, precision (float32) and eager mode.
Each side is a process of its own, so that its peak memory is its own; they take turns, a few steps
each, so that all see the same machine. `ours, shipped` has the allocator settings that a fleet
gives its worker processes; `ours` has glibc's, as `transformers` has.

    python benchmarks/train_throughput.py [--threads 1] [--rounds 15] [--sizes 32x2 64x4]

Prints medians, ratios of paired turns, peak memory above that of the imports, and where a step of
ours goes: its matrix products timed alone in the same run, which is the arithmetic limit, and the
rest.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from workers.fleet.ray_environment import ALLOCATOR

SIDES = ("ours, shipped", "ours", "transformers")


class Side:
    """A process that trains when it is asked to."""

    def __init__(self, side: str, size: str, threads: int) -> None:
        program = Path(__file__).parent / "llama" / "side.py"
        self.process = subprocess.Popen(
            [sys.executable, program, side.split(",", maxsplit=1)[0], size, str(threads)],
            env=os.environ | (ALLOCATOR if "shipped" in side else {}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, what: str) -> dict[str, float]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(what, file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())


def compare(size: str, *, threads: int, rounds: int) -> None:
    """Let the sides take turns at one size; print the rows of the table."""
    sides = {name: Side(name, size, threads) for name in SIDES}
    turns = [{name: side.ask("turn") for name, side in sides.items()} for _ in range(rounds)]
    parts = sides["ours"].ask("parts")
    print(f"\n{size:16} {'tok/s':>9} {'ratio (min..max)':>18} {'CPU-time ratio':>15} {'peak':>8}")
    for name, side in sides.items():
        speed = statistics.median(turn[name]["wall"] for turn in turns)
        wall, cpu = ratios(turns, name, "wall"), ratios(turns, name, "cpu")
        spread = f"{statistics.median(wall):.2f} ({min(wall):.2f}..{max(wall):.2f})"
        peak = side.ask("end")["peak_mb"]
        row = f"{name:16} {speed:9,.0f} {spread:>18} {statistics.median(cpu):15.2f} {peak:5.0f} MB"
        print(row)
    print("  ms of `ours`: " + "; ".join(f"{name} {value:.1f}" for name, value in parts.items()))


def ratios(turns: list[dict[str, Any]], name: str, clock: str) -> list[float]:
    return [turn[name][clock] / turn["transformers"][clock] for turn in turns]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--sizes", nargs="+", default=["32x2", "64x4", "128x4", "256x4"])
    arguments = parser.parse_args()
    print(f"{arguments.threads} thread(s), 16 x 128 tokens per step, {arguments.rounds} rounds")
    for size in arguments.sizes:
        compare(size, threads=arguments.threads, rounds=arguments.rounds)


if __name__ == "__main__":
    main()
