"""Training throughput and memory against transformers' LlamaForCausalLM, in the same run.

Shapes, batch, optimizer (fused AdamW), clipping, threads, precision (float32) and eager mode are
equal. Each side is a process of its own, for a separate peak memory. The sides take turns of a few
steps, to meet the same load. `ours, shipped` has the allocator settings that a fleet gives its
worker processes; `ours` and `transformers` have the defaults of glibc.

    python benchmarks/train_throughput.py [--threads 1] [--rounds 15] [--sizes 32x2 64x4]

The program prints medians, ratios of paired turns, and peak memory above that of the imports. It
also splits our step into matrix products, timed alone in the same run, and the remaining time. The
products are the arithmetic limit.
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
    """A process that trains on request."""

    def __init__(self, side: str, size: str, threads: int) -> None:
        program = Path(__file__).parent / "llama" / "side.py"
        self.process = subprocess.Popen(
            [sys.executable, program, side.split(",", maxsplit=1)[0], size, str(threads)],
            env=os.environ | (ALLOCATOR if "shipped" in side else {}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def send_request(self, request: str) -> dict[str, float]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(request, file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())


def compare_sides(size: str, *, threads: int, rounds: int) -> None:
    """Let the sides take turns at a size, and print the rows of the table."""
    sides = {name: Side(name, size, threads) for name in SIDES}
    # All sides train in each round: a burst of load hits all of them alike.
    turns = [
        {name: side.send_request("turn") for name, side in sides.items()} for _ in range(rounds)
    ]
    parts = sides["ours"].send_request("parts")
    print(f"\n{size:16} {'tok/s':>9} {'ratio (min..max)':>18} {'CPU-time ratio':>15} {'peak':>8}")
    for name, side in sides.items():
        speed = statistics.median(turn[name]["wall"] for turn in turns)
        wall, cpu = compute_ratios(turns, name, "wall"), compute_ratios(turns, name, "cpu")
        spread = f"{statistics.median(wall):.2f} ({min(wall):.2f}..{max(wall):.2f})"
        peak = side.send_request("end")["peak_mb"]
        row = f"{name:16} {speed:9,.0f} {spread:>18} {statistics.median(cpu):15.2f} {peak:5.0f} MB"
        print(row)
    print("  ms of `ours`: " + "; ".join(f"{name} {value:.1f}" for name, value in parts.items()))


def compute_ratios(turns: list[dict[str, Any]], name: str, clock: str) -> list[float]:
    return [turn[name][clock] / turn["transformers"][clock] for turn in turns]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--sizes", nargs="+", default=["32x2", "64x4", "128x4", "256x4"])
    arguments = parser.parse_args()
    print(f"{arguments.threads} thread(s), 16 x 128 tokens per step, {arguments.rounds} rounds")
    for size in arguments.sizes:
        compare_sides(size, threads=arguments.threads, rounds=arguments.rounds)


if __name__ == "__main__":
    main()
