"""Several processes that train the same model, with torch.distributed.

The spec gives the batch of a step, for any number n of processes. Rank r reads the rows
[r B/n, (r + 1) B/n) of the batch, and the gradient is the mean over ranks. The curve therefore
equals the curve of a single process up to the order of float32 additions. `ddp` keeps a whole model
on every rank (arXiv 2006.15704). `fsdp` keeps an n-th of every tensor, gradient and moment, and
gathers a block at a time (arXiv 2304.11277; torch's `fully_shard`).

Rank 0 leads: it announces each collective act before the act, and the other ranks follow. Only rank
0 decides when to stop and when to save.
"""

# torch's modules for sharding take 45 MB of memory: import them only to shard.
# ruff: noqa: PLC0415

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from warmcore.model.decoder import Decoder
from warmcore.specs import RunSpec, Strategy
from warmcore.tensors.files import TensorStream

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


@dataclass(frozen=True, kw_only=True)
class Beginning:
    """The act of beginning a run, announced after rank 0 has checked the run.

    Every rank can read the path `checkpoint`: all ranks are on the same machine.
    """

    how: Literal["start", "resume"]
    spec: RunSpec
    checkpoint: Path | None


Act = Beginning | Literal["advance", "save", "end"]


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """The rank of this process among `size`; above 1, torch's default group must exist."""

    rank: int = 0
    size: int = 1
    strategy: Strategy = "ddp"

    @classmethod
    def from_process_group(cls, strategy: Strategy) -> "Ranks":
        """Return the rank of this process in torch's default process group."""
        return cls(rank=dist.get_rank(), size=dist.get_world_size(), strategy=strategy)

    def select_rows(self, batch_BT: Tensor) -> Tensor:  # noqa: N803 - shapes by suffix
        """Return this rank's rows [B/n, T] of a batch [B, T]."""
        return batch_BT.chunk(self.size)[self.rank]

    def place_model(self, model: Decoder, device: str) -> Decoder:
        """Move a model to `device`: all of it, or this rank's shards, block by block."""
        if self.size == 1 or self.strategy == "ddp":
            return model.to(device)
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(torch.device(device).type, (self.size,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        # An evaluation gathers the outer tensors and has no backward pass to free them. Without
        # this they would still be whole when a checkpoint is saved.
        fully_shard(model, mesh=mesh, reshard_after_forward=True)
        return model

    def wrap_averaging(self, model: Decoder) -> nn.Module:
        """Return the module to train through: its gradients are means over ranks."""
        # `fully_shard` averages by itself.
        if self.size == 1 or self.strategy == "fsdp":
            return model
        return DistributedDataParallel(model, gradient_as_bucket_view=True)

    def mean_over_ranks(self, value: Tensor) -> Tensor:
        """Return the mean over ranks, with the same bits on all ranks."""
        return value if self.size == 1 else self.sum_over_ranks(value) / self.size

    def sum_over_ranks(self, value: Tensor) -> Tensor:
        """Return the sum over ranks, with the same bits on all ranks."""
        if self.size == 1:
            return value
        total = value.detach().clone()
        dist.all_reduce(total)
        return total

    def announce_act(self, act: Act) -> None:
        """Send the next act from rank 0 to the other ranks; do nothing elsewhere."""
        if self.size > 1 and self.rank == 0:
            dist.broadcast_object_list([act], src=0)

    def receive_act(self) -> Act:
        """Wait for the next act of rank 0."""
        acts: list[Act] = ["end"]  # torch replaces the elements
        dist.broadcast_object_list(acts, src=0)
        return acts[0]

    def wait_for_all(self) -> None:
        """Wait until all ranks have come here."""
        # Rank 0 may delete a base that it downloaded once every rank has read the base.
        if self.size > 1:
            self.sum_over_ranks(torch.zeros(1))


ALONE = Ranks()


def choose_backend(device: str) -> str:
    """Return the backends of torch's process group for a device."""
    # NCCL carries tensors on GPUs. gloo carries tensors on the CPU, and with them the acts.
    return "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"


def gather_whole(tensor: Tensor) -> Tensor:
    """Return a sharded tensor as a whole; all ranks must call this at once."""
    return cast("DTensor", tensor).full_tensor() if is_sharded(tensor) else tensor


def is_sharded(tensor: Tensor) -> bool:
    """Return whether this is torch's DTensor, of which a process holds a shard."""
    return hasattr(tensor, "full_tensor")


def gather_stream(stream: TensorStream) -> TensorStream:
    """Gather each tensor of a stream when it is read; all ranks must read at once."""
    tensors = ((name, gather_whole(tensor)) for name, tensor in stream.tensors)
    return dataclasses.replace(stream, tensors=tensors)


def shard_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Copy `tensor` to the place of `parameter`: all of it, or this rank's shard."""
    moved = tensor.to(parameter.device, copy=True)
    if not is_sharded(parameter):
        return moved
    from torch.distributed.tensor import distribute_tensor

    sharded = cast("DTensor", parameter)
    # Every rank has the whole tensor already: with a source rank torch would send it again.
    return distribute_tensor(moved, sharded.device_mesh, sharded.placements, src_data_rank=None)
