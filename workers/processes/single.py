"""Functions that run in Ray's worker processes, where torch is imported once per process."""
# The fleet's driver imports this file to submit its functions, and never needs torch.
# ruff: noqa: PLC0415

import contextlib
import dataclasses
import functools
import os
import signal
import tempfile
from collections.abc import Callable, Generator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import ray

from service.client import Client
from service.protocol import Lease
from workers import run_logs
from workers.processes import begun_marks

if TYPE_CHECKING:
    from workers.attempt.execute import Ending

# Longest outage of the service that a run waits for. After it the run fails, and its last published
# checkpoint remains.
PATIENCE_SECONDS = 600.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Connection:
    """Address and key of the service."""

    url: str
    api_key: str = dataclasses.field(repr=False)


def warm_up(*, device: str | None = None) -> int:
    """Import everything, train two tiny steps, and return the process id."""
    from warmcore.corpus.prepare import prepare_corpus
    from warmcore.specs import DataSpec, ModelSpec, RunSpec, TrainSpec
    from warmcore.training.training import Training
    from workers.attempt import execute as run

    del run  # imported for its imports: the first run would otherwise pay for them
    with tempfile.TemporaryDirectory(prefix="warmscale-") as folder:
        for name in "abcd":
            (Path(folder) / f"{name}.txt").write_text(f"{name} warm worker starts sooner\n" * 20)
        spec = RunSpec(
            model=ModelSpec(width=16, depth=1, head_dim=16),
            data=DataSpec(source=folder, context=16, val_fraction=0.5),
            train=TrainSpec(batch_size=2, num_tokens=64, evaluations=1, eval_tokens=32),
        )
        corpus = prepare_corpus(spec.data, Path(folder) / "cache")
        for _ in Training.start(spec, corpus, device=device or device_of(0)).train_to_end():
            pass
    return os.getpid()


def run_lease(
    lease: Lease,
    connection: Connection,
    *,
    checkpoint_seconds: float,
    leased_at: float,
    mark: str | None = None,
) -> "Ending":
    """Run a lease in this process; `mark` shows the fleet that the task has begun."""
    # Mark before importing torch, which may take longer than a lease lasts.
    with begun_marks.mark_begun(mark):
        return _run_pinned(lease, connection, checkpoint_seconds, leased_at)


def _run_pinned(
    lease: Lease, connection: Connection, checkpoint_seconds: float, leased_at: float
) -> "Ending":
    from workers.attempt import cpus
    from workers.attempt.execute import execute_lease
    from workers.attempt.options import AttemptOptions

    client = client_of(connection)
    with (
        run_logs.log_run(lease),
        drain_on_cancel() as draining,
        cpus.pin_threads(lease.resources.cpus) as num_threads,
    ):
        options = AttemptOptions(
            checkpoint_seconds=checkpoint_seconds,
            device=device_of(lease.resources.gpus),
            num_threads=num_threads,
            leased_at=leased_at,
        )
        return execute_lease(lease, client, options=options, draining=draining)


@functools.cache
def client_of(connection: Connection) -> Client:
    """Return the client of this process; every run of the process shares it."""
    return Client(connection.url, connection.api_key, patience_seconds=PATIENCE_SECONDS)


@contextlib.contextmanager
def drain_on_cancel() -> Generator[Callable[[], bool]]:
    """Turn `ray.cancel` into a flag until the context ends.

    Ray cancels a running task by simulating SIGINT, which calls Python's handler of SIGINT. With
    this handler the run goes on until it has published a checkpoint, and returns its ending.
    """
    # Draining, in order: the fleet calls `ray.cancel`; this handler raises the flag; after the
    # current step the attempt saves, publishes and finishes as "released"; another fleet resumes
    # there. A run at step 137 loses no step, however long ago its last checkpoint was.
    flags: list[int] = []

    def raise_flag(signum: int, _frame: FrameType | None) -> None:
        flags.append(signum)

    before = signal.signal(signal.SIGINT, raise_flag)
    try:
        yield lambda: bool(flags)
    finally:
        signal.signal(signal.SIGINT, before)


def device_of(gpus: float) -> str:
    """Return the device that Ray assigned, and cap its memory at the share that was asked for.

    Ray only counts fractions of a GPU. Without the cap a run could use the memory of another.
    """
    if not gpus:
        return "cpu"
    import torch

    (assigned, *_) = ray.get_runtime_context().get_accelerator_ids()["GPU"]
    # Ray names the GPU by its number on the node, and torch counts the visible GPUs: with
    # CUDA_VISIBLE_DEVICES=2,5 Ray's GPU 5 is torch's cuda:1.
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    index = visible.split(",").index(assigned) if visible else int(assigned)
    torch.cuda.set_per_process_memory_fraction(min(1.0, gpus), index)
    return f"cuda:{index}"
