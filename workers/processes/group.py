"""A run that several processes share: a Ray Train `TorchTrainer`, led from a task of its own.

Rank 0 executes the attempt (`workers.attempt.execute`), and the other ranks follow it. Ray Train
places and joins the processes, and ends all of them when one fails. The task then fails, and the
service decides whether to retry the run. All processes are on one node: a file in a folder of that
node asks rank 0 to drain, because rank 0's code does not run where Ray delivers signals.
"""
# As in `workers.processes.single`: the fleet's driver imports this file and never needs torch.
# ruff: noqa: PLC0415

import contextlib
import dataclasses
import functools
import os
import tempfile
from collections.abc import Mapping
from concurrent import futures
from pathlib import Path
from typing import TYPE_CHECKING, Any

from service.protocol import Lease
from workers import run_logs
from workers.attempt.reporter import Reporter
from workers.failures import UnrunnableError
from workers.processes.single import Connection, client_of, device_of, drain_on_cancel

if TYPE_CHECKING:
    from workers.attempt.execute import Ending

_TICK_SECONDS = 0.2
# Of one word between ranks: rank 0 may be waiting out an outage of the service.
_COLLECTIVE_SECONDS = 1800
_SETTINGS = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # a relative path of data means the same to every process
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # how late an end is noticed
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_WORKER_STRUCTURED_LOGGING": "0",
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shared:
    """What every process of a run needs to know."""

    lease: Lease
    connection: Connection
    checkpoint_seconds: float
    leased_at: float
    folder: Path

    @property
    def has_begun(self) -> Path:
        """Exists once rank 0 keeps the lease itself."""
        return self.folder / "begun"

    @property
    def drain(self) -> Path:
        """Exists once the run is to be given back."""
        return self.folder / "drain"


def run_group(
    lease: Lease,
    connection: Connection,
    *,
    checkpoint_seconds: float,
    leased_at: float,
    node: str,
) -> "Ending":
    """Run a lease in as many processes as it asks for, on this node; this one only waits."""
    with (
        run_logs.about(lease),
        drain_on_cancel() as draining,
        tempfile.TemporaryDirectory(prefix="warmscale-") as folder,
        contextlib.ExitStack() as starting,
        futures.ThreadPoolExecutor(1) as pool,
    ):
        shared = Shared(
            lease=lease,
            connection=connection,
            checkpoint_seconds=checkpoint_seconds,
            leased_at=leased_at,
            folder=Path(folder),
        )
        starting.enter_context(Reporter(client_of(connection), lease))
        fit = pool.submit(_fit, shared, node)
        while not fit.done():
            futures.wait([fit], timeout=_TICK_SECONDS)
            if shared.has_begun.exists():
                starting.close()
            if draining():
                shared.drain.touch()
        return fit.result()


def _fit(shared: Shared, node: str) -> "Ending":
    os.environ.update(_SETTINGS)  # read when a trainer is made
    from ray.train import FailureConfig, RunConfig, ScalingConfig, WorkerGroupError
    from ray.train.torch import TorchConfig, TorchTrainer

    from warmcore.training.ranks import backend

    needs, size = shared.lease.resources, shared.lease.resources.num_processes
    each = {"CPU": needs.cpus / size, "GPU": needs.gpus / size}
    trainer = TorchTrainer(
        functools.partial(_share, shared),  # its config would be logged, and the key with it
        torch_config=TorchConfig(
            backend=backend("cuda" if needs.gpus else "cpu"), timeout_s=_COLLECTIVE_SECONDS
        ),
        scaling_config=ScalingConfig(
            num_workers=size,
            use_gpu=needs.gpus > 0,
            resources_per_worker={name: share for name, share in each.items() if share},
            label_selector={"ray.io/node-id": node},
        ),
        run_config=RunConfig(
            name=shared.lease.run_id,
            storage_path=str(shared.folder),
            failure_config=FailureConfig(
                max_failures=0, controller_failure_limit=0, max_preemption_failures=0
            ),
        ),
    )
    try:
        result: Any = trainer.fit()
    except WorkerGroupError as error:
        raise _cause(error.worker_failures) or error from None
    return result.return_value


def _cause(failures: Mapping[int, BaseException]) -> UnrunnableError | None:
    """The verdict on the run itself, if any process came to one."""
    causes = [getattr(error, "_base_exc", error) for error in failures.values()]
    return next((cause for cause in causes if isinstance(cause, UnrunnableError)), None)


def _share(shared: Shared) -> "Ending | None":
    """One process's part; rank 0 tells how it ended."""
    from warmcore.training.follow import follow
    from warmcore.training.ranks import Ranks
    from workers.attempt import cpus
    from workers.attempt.execute import execute
    from workers.attempt.options import AttemptOptions

    needs, size = shared.lease.resources, shared.lease.resources.num_processes
    ranks, device = Ranks.joined(needs.strategy), device_of(needs.gpus / size)
    with run_logs.about(shared.lease), cpus.pinned(needs.cpus // size) as num_threads:
        if ranks.rank:
            return follow(ranks, device=device)
        shared.has_begun.touch()
        options = AttemptOptions(
            checkpoint_seconds=shared.checkpoint_seconds,
            device=device,
            num_threads=num_threads,
            ranks=ranks,
            leased_at=shared.leased_at,
        )
        client = client_of(shared.connection)
        ending = execute(shared.lease, client, options=options, draining=shared.drain.exists)
        ranks.lead("end")
        return ending
