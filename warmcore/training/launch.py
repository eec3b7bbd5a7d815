"""Several processes of a single run on this machine, without Ray: rank 0 leads, others follow."""

import logging
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessContext, ProcessExitedException, start_processes

from warmcore.specs import Strategy
from warmcore.training.follow import follow_rank_0
from warmcore.training.ranks import Ranks, choose_backend

LeadFunction = Callable[[Ranks, str], int]


@dataclass(frozen=True, kw_only=True)
class LaunchOptions:
    """The number of processes and the share of the machine for each."""

    size: int
    strategy: Strategy
    device: str
    num_threads: int | None


def lead_processes(lead: LeadFunction, launch: LaunchOptions) -> int:
    """Call `lead` with rank 0 and a device, have the other processes follow, return the exit code.

    The first process that fails ends all.
    """
    with tempfile.TemporaryDirectory(prefix="warmcore-") as folder:
        # A file, not a TCP port: a port may be taken, and every user of the machine can reach it.
        store = f"file://{folder}/store"
        context = start_processes(
            _run_process,
            (lead, launch, store),
            nprocs=launch.size,
            join=False,
            start_method="spawn",
        )
        assert context is not None
        _forward_signals(context)
        try:
            while not context.join():
                pass
        except ProcessExitedException as error:
            return error.exit_code
    return 0


def _forward_signals(context: ProcessContext) -> None:
    """Forward SIGINT and SIGTERM to rank 0, which stops between two events and saves."""
    leader = context.pids()[0]

    def forward_signal(number: int, _frame: object) -> None:
        os.kill(leader, number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, forward_signal)


def _run_process(rank: int, lead: LeadFunction, launch: LaunchOptions, store: str) -> None:
    # A terminal sends Ctrl-C to all processes of its group. Only rank 0 may stop the run.
    if rank:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(launch.num_threads or max(1, torch.get_num_threads() // launch.size))
    device = launch.device
    if device == "cuda":
        device = f"cuda:{rank}"
        torch.cuda.set_device(device)
    dist.init_process_group(
        choose_backend(device), init_method=store, rank=rank, world_size=launch.size
    )
    ranks = Ranks.from_process_group(launch.strategy)
    code = 0
    if rank:
        follow_rank_0(ranks, device=device)
    else:
        code = lead(ranks, device)
        ranks.announce_act("end")
    exit_at_once(code)


def exit_at_once(code: int = 0) -> NoReturn:
    """End this process without Python's and torch's cleanup; all files must be written."""
    # The cleanup of gloo's threads sometimes aborts the process ("terminate called without an
    # active exception"; 1 of about 20 runs on two cores). That would look like a failed run.
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
