"""Growth of a checkpoint from disk to disk, against a plain copy of the target's bytes.

A child process makes a random base checkpoint. Another child grows it x2 in width. Its time begins
after the imports, includes the check of the base's hashes, and ends when the folder is synced and
renamed. The copy is `shutil.copytree` of the grown folder (sendfile in the kernel) and an fsync of
each file. Growth and copy take turns. Each reads files that were just written, hence from the page
cache if they fit. CPU seconds (user, system) distinguish a busy machine from slow code. Peak memory
is the child's ru_maxrss, imports included. It is compared with a limit: 0.2 x the target's bytes +
2 x its largest tensor + 300 MB.

    python benchmarks/grow.py [--size 0.3B] [--operator shrink_perturb] [--rounds 3]
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import torch

from warmcore.checkpoint.checkpoint import SavedCheckpoint, save_checkpoint
from warmcore.checkpoint.progress import Progress
from warmcore.growth.from_checkpoint import grow_checkpoint
from warmcore.model.decoder import Decoder, init_weights_, parameter_shapes
from warmcore.specs import CheckpointRef, DataSpec, GrowthSpec, ModelSpec, RunSpec
from warmcore.specs.sizes import count_params
from warmcore.tensors.files import TensorStream
from warmcore.training.optimizer import build_optimizer, optimizer_tensors

# Width, depth and vocabulary of the base; the target is twice as wide.
SIZES = {"3M": (256, 4, 256), "30M": (512, 9, 2048), "0.3B": (1024, 22, 16384)}
MB = 1e6


@dataclass(frozen=True, kw_only=True)
class Clock:
    """Seconds on the wall clock and of this process's CPU."""

    wall: float
    user: float
    system: float

    @classmethod
    def read_now(cls) -> Self:
        used = resource.getrusage(resource.RUSAGE_SELF)
        return cls(wall=time.perf_counter(), user=used.ru_utime, system=used.ru_stime)

    def __sub__(self, other: Self) -> Self:
        return type(self)(
            wall=self.wall - other.wall,
            user=self.user - other.user,
            system=self.system - other.system,
        )


def make_model_spec(size: str) -> ModelSpec:
    width, depth, vocab_size = SIZES[size]
    return ModelSpec(width=width, depth=depth, head_dim=64, vocab_size=vocab_size)


def make_base(size: str, path: Path, *, optimizer: bool) -> SavedCheckpoint:
    """Save random weights and, if `optimizer`, the state of Adam after a step on gradients of 1."""
    spec = make_model_spec(size)
    model = init_weights_(Decoder(spec, context=1), spec, torch.Generator().manual_seed(0))
    run = RunSpec(model=spec, data=DataSpec(source="stdlib"))
    adam = build_optimizer(model.named_parameters(), spec, run.train)
    # A step gives every parameter both moments of Adam, which growth then has to transfer.
    if optimizer:
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        adam.step()
    return save_checkpoint(
        path,
        weights=TensorStream.from_tensors(model.state_dict()),
        optimizer=TensorStream.from_tensors(optimizer_tensors(adam)),
        run=run,
        data_hash="random",
        base_hash=None,
        tokens=0,
        progress=Progress(),
    )


def make_run_spec(size: str, base_hash: str, operator: str, rule: str) -> RunSpec:
    base = make_model_spec(size)
    target = base.model_copy(
        update={"width": 2 * base.width, "base_width": base.width, "base_depth": base.depth}
    )
    options = {"operator": operator, "optimizer_state": rule}
    growth = GrowthSpec.model_validate(
        options | {"base": CheckpointRef(uri="base", hash=base_hash)}
    )
    # base_width and base_depth stay the base's: the target's muP factors depend on them.
    return RunSpec(model=target, data=DataSpec(source="stdlib"), growth=growth)


def run_make_child(arguments: argparse.Namespace) -> None:
    """Write the base, and the spec of the run that grows it; runs in the first child."""
    rule = arguments.optimizer_state
    base = make_base(arguments.size, arguments.folder / "base", optimizer=rule != "reset")
    run = make_run_spec(arguments.size, base.hash, arguments.operator, rule)
    (arguments.folder / "run.json").write_text(run.model_dump_json())
    print("{}")


def run_grow_child(arguments: argparse.Namespace) -> None:
    """Grow the base and print seconds and peak memory as JSON; runs in a child for each round."""
    run = RunSpec.model_validate_json((arguments.folder / "run.json").read_text())
    start = Clock.read_now()
    grow_checkpoint(arguments.folder / "base", arguments.folder / "grown", run=run)
    taken = Clock.read_now() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps(asdict(taken) | {"peak": peak}))


def run_child(task: str, folder: Path) -> dict[str, float]:
    command = [sys.executable, __file__, *sys.argv[1:], "--child", task, "--folder", str(folder)]
    child = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(child.stdout)


def copy_folder(source: Path, target: Path) -> Clock:
    """Copy a folder's files, sync them, delete the copy, and return the time."""
    start = Clock.read_now()
    shutil.copytree(source, target)
    for path in target.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    taken = Clock.read_now() - start
    shutil.rmtree(target)
    return taken


def measure_growth(arguments: argparse.Namespace, folder: Path) -> None:
    run_child(
        "make", folder
    )  # in a child: ru_maxrss of later children begins at this process's memory
    run = RunSpec.model_validate_json((folder / "run.json").read_text())
    setting = (
        f"{arguments.operator}, {arguments.optimizer_state}, {arguments.threads} torch thread(s)"
    )
    print(f"{setting}: {count_params(run.model).total / MB:,.0f} M parameters")
    print("         wall  user   sys |   copy  user   sys | ratio | load")
    peaks, ratios, grown, copied = [], [], [], []
    for _ in range(arguments.rounds):
        child = run_child("grow", folder)
        peaks.append(child.pop("peak"))
        pair = Clock(**child), copy_folder(folder / "grown", folder / "copy")
        ratios.append(pair[0].wall / pair[1].wall)
        grown.append(pair[0].wall)
        copied.append(pair[1].wall)
        a, b = (f"{c.wall:6.2f} {c.user:5.2f} {c.system:5.2f}" for c in pair)
        print(f"       {a} | {b} | {ratios[-1]:5.2f} | {os.getloadavg()[0]:.1f}", flush=True)
    # Medians of each column, and the median of the paired ratios: load changes between rounds.
    columns = (("grown, s", grown), ("copied, s", copied), ("ratio", ratios))
    for label, values in columns:
        spread = f"{min(values):.2f}..{max(values):.2f}"
        print(f"{label:9} {statistics.median(values):6.2f} ({spread})")
    num_bytes = sum(path.stat().st_size for path in (folder / "grown").iterdir())
    largest = max(shape.numel() for shape in parameter_shapes(run.model).values()) * 4
    allowed = 0.2 * num_bytes + 2 * largest + 300 * MB
    peak = f"peak {max(peaks) / MB:,.0f} MB of {allowed / MB:,.0f} MB allowed"
    print(f"{peak}, for {num_bytes / MB:,.0f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="0.3B")
    parser.add_argument("--operator", default="shrink_perturb")
    parser.add_argument("--optimizer-state", default="reset")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--child", choices=("make", "grow"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    match arguments.child:
        case "make":
            run_make_child(arguments)
        case "grow":
            run_grow_child(arguments)
        case _:
            with tempfile.TemporaryDirectory() as folder:
                measure_growth(arguments, Path(folder))


if __name__ == "__main__":
    main()
