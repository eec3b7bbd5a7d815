"""Several processes of one run on this machine, without Ray: rank 0 leads, the others follow."""

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
from warmcore.training.follow import follow
from warmcore.training.ranks import Ranks, backend

Lead = Callable[[Ranks, str], int]


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How many processes, and each one's share of the machine."""

    size: int
    strategy: Strategy
    device: str
    num_threads: int | None


def lead_processes(lead: Lead, launch: Launch) -> int:
    """Call `lead` with rank 0 and its device, with the other processes following; its exit code.

    The first process that fails ends all. Signals are rank 0's: it stops where state is whole.
    """
    with tempfile.TemporaryDirectory(prefix="warmcore-") as folder:
        store = f"file://{folder}/store"  # a port would have to be found free, and is open to all
        context = start_processes(
            _process, (lead, launch, store), nprocs=launch.size, join=False, start_method="spawn"
        )
        assert context is not None
        _hand_on_signals(context)
        try:
            while not context.join():
                pass
        except ProcessExitedException as error:
            return error.exit_code
    return 0


def _hand_on_signals(context: ProcessContext) -> None:
    leader = context.pids()[0]

    def hand_on(number: int, _frame: object) -> None:
        os.kill(leader, number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, hand_on)


def _process(rank: int, lead: Lead, launch: Launch, store: str) -> None:
    if rank:  # a terminal's Ctrl-C reaches all of us
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(launch.num_threads or max(1, torch.get_num_threads() // launch.size))
    device = launch.device
    if device == "cuda":
        device = f"cuda:{rank}"
        torch.cuda.set_device(device)
    dist.init_process_group(backend(device), init_method=store, rank=rank, world_size=launch.size)
    ranks = Ranks.joined(launch.strategy)
    code = 0
    if rank:
        follow(ranks, device=device)
    else:
        code = lead(ranks, device)
        ranks.lead("end")
    leave(code)


def leave(code: int = 0) -> NoReturn:
    """End this process at once, its work done and its files written.

    Taking gloo's threads down one by one aborts the process now and then ("terminate called
    without an active exception"; 1 of about 20 runs on two cores), which would look like a failure.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
