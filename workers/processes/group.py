"""A run in several processes: a Ray Train `TorchTrainer`, started from a Ray task of its own.

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
# Longest wait of a rank for a message: rank 0 may be waiting for the service, up to 600 s.
_COLLECTIVE_SECONDS = 1800
_SETTINGS = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths of data keep their meaning
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # Ray notices the end of a process this late
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_WORKER_STRUCTURED_LOGGING": "0",
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupRun:
    """A run in several processes: the data that every process needs."""

    lease: Lease
    connection: Connection
    checkpoint_seconds: float
    leased_at: float
    folder: Path

    @property
    def begun_file(self) -> Path:
        """A file that exists once rank 0 renews the lease itself."""
        return self.folder / "begun"

    @property
    def drain_file(self) -> Path:
        """A file that exists once the run must be given back."""
        return self.folder / "drain"


def run_group(
    lease: Lease,
    connection: Connection,
    *,
    checkpoint_seconds: float,
    leased_at: float,
    node: str,
) -> "Ending":
    """Run a lease in as many processes as it asks for, on this node; this process waits."""
    with (
        run_logs.log_run(lease),
        drain_on_cancel() as draining,
        tempfile.TemporaryDirectory(prefix="warmscale-") as folder,
        contextlib.ExitStack() as starting,
        futures.ThreadPoolExecutor(1) as pool,
    ):
        group = GroupRun(
            lease=lease,
            connection=connection,
            checkpoint_seconds=checkpoint_seconds,
            leased_at=leased_at,
            folder=Path(folder),
        )
        # Processes and torch may take longer to start than the lease lasts. This reporter renews
        # the lease until rank 0's reporter does; the file `begun` ends the first.
        starting.enter_context(Reporter(client_of(connection), lease))
        fit = pool.submit(_fit_trainer, group, node)
        while not fit.done():
            futures.wait([fit], timeout=_TICK_SECONDS)
            if group.begun_file.exists():
                starting.close()
            if draining():
                group.drain_file.touch()
        return fit.result()


def _fit_trainer(group: GroupRun, node: str) -> "Ending":
    os.environ.update(_SETTINGS)  # read when a trainer is made
    from ray.train import FailureConfig, RunConfig, ScalingConfig, WorkerGroupError
    from ray.train.torch import TorchConfig, TorchTrainer

    from warmcore.training.ranks import choose_backend

    needs, size = group.lease.resources, group.lease.resources.num_processes
    each = {"CPU": needs.cpus / size, "GPU": needs.gpus / size}
    trainer = TorchTrainer(
        functools.partial(_run_rank, group),  # Ray would log a config, and with it the API key
        torch_config=TorchConfig(
            backend=choose_backend("cuda" if needs.gpus else "cpu"), timeout_s=_COLLECTIVE_SECONDS
        ),
        scaling_config=ScalingConfig(
            num_workers=size,
            use_gpu=needs.gpus > 0,
            resources_per_worker={name: share for name, share in each.items() if share},
            label_selector={"ray.io/node-id": node},
        ),
        run_config=RunConfig(
            name=group.lease.run_id,
            storage_path=str(group.folder),
            failure_config=FailureConfig(
                max_failures=0, controller_failure_limit=0, max_preemption_failures=0
            ),
        ),
    )
    try:
        result: Any = trainer.fit()
    except WorkerGroupError as error:
        raise _find_cause(error.worker_failures) or error from None
    return result.return_value


def _find_cause(failures: Mapping[int, BaseException]) -> UnrunnableError | None:
    """Return the `UnrunnableError` among the failures, if any process raised it."""
    # Ray Train wraps an exception of a process and keeps the original in `_base_exc`.
    causes = [getattr(error, "_base_exc", error) for error in failures.values()]
    return next((cause for cause in causes if isinstance(cause, UnrunnableError)), None)


def _run_rank(group: GroupRun) -> "Ending | None":
    """Run the part of this process; rank 0 returns the ending, other ranks return None."""
    from warmcore.training.follow import follow_rank_0
    from warmcore.training.ranks import Ranks
    from workers.attempt import cpus
    from workers.attempt.execute import execute_lease
    from workers.attempt.options import AttemptOptions

    needs, size = group.lease.resources, group.lease.resources.num_processes
    ranks, device = Ranks.from_process_group(needs.strategy), device_of(needs.gpus / size)
    with run_logs.log_run(group.lease), cpus.pin_threads(needs.cpus // size) as num_threads:
        if ranks.rank:
            return follow_rank_0(ranks, device=device)
        group.begun_file.touch()
        options = AttemptOptions(
            checkpoint_seconds=group.checkpoint_seconds,
            device=device,
            num_threads=num_threads,
            ranks=ranks,
            leased_at=group.leased_at,
        )
        client = client_of(group.connection)
        ending = execute_lease(
            group.lease, client, options=options, draining=group.drain_file.exists
        )
        ranks.announce_act("end")
        return ending
