"""Several processes that train one model, with torch.distributed.

The batch of a step is the spec's, whatever their number n: rank r reads rows [r B/n, (r + 1) B/n)
of it, and the gradient is the mean over ranks, so the curve is that of one process up to the order
of float32 additions. `ddp` keeps a whole model on every rank (arXiv 2006.15704); `fsdp` an n-th
of every tensor, of its gradient and of its moments, and gathers a block at a time (arXiv
2304.11277; torch's `fully_shard`).

Rank 0 leads: before each of its collective acts it says which, and the others follow. So only rank
0 has anything to decide: when to stop, when to save.

What shards is imported where something is sharded: it takes 45 MB.
"""
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
    """How rank 0 begins a run, once it has found that it can; `checkpoint` is on this machine."""

    how: Literal["start", "resume"]
    spec: RunSpec
    checkpoint: Path | None


Act = Beginning | Literal["advance", "save", "end"]


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process's place among `size`; with more than one the default group must be there."""

    rank: int = 0
    size: int = 1
    strategy: Strategy = "ddp"

    @classmethod
    def from_process_group(cls, strategy: Strategy) -> "Ranks":
        """Our place in torch's default process group."""
        return cls(rank=dist.get_rank(), size=dist.get_world_size(), strategy=strategy)

    def select_rows(self, batch_BT: Tensor) -> Tensor:  # noqa: N803 - shapes by suffix
        """Our rows [B/n, T] of a batch [B, T]."""
        return batch_BT.chunk(self.size)[self.rank]

    def place_model(self, model: Decoder, device: str) -> Decoder:
        """Move a model to `device`: all of it, or our shards, block by block."""
        if self.size == 1 or self.strategy == "ddp":
            return model.to(device)
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(torch.device(device).type, (self.size,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        # Resharded, or what an evaluation gathered would be there when a checkpoint is saved.
        fully_shard(model, mesh=mesh, reshard_after_forward=True)
        return model

    def wrap_averaging(self, model: Decoder) -> nn.Module:
        """The module to train through: its gradients are means over ranks."""
        if self.size == 1 or self.strategy == "fsdp":  # `fully_shard` averages by itself
            return model
        return DistributedDataParallel(model, gradient_as_bucket_view=True)

    def mean_over_ranks(self, value: Tensor) -> Tensor:
        """Mean over ranks; the same bits on all of them."""
        return value if self.size == 1 else self.sum_over_ranks(value) / self.size

    def sum_over_ranks(self, value: Tensor) -> Tensor:
        """Sum over ranks; the same bits on all of them."""
        if self.size == 1:
            return value
        total = value.detach().clone()
        dist.all_reduce(total)
        return total

    def announce_act(self, act: Act) -> None:
        """On rank 0: tell the others what it does next."""
        if self.size > 1 and self.rank == 0:
            dist.broadcast_object_list([act], src=0)

    def receive_act(self) -> Act:
        """On the others: wait for what rank 0 does next."""
        acts: list[Act] = ["end"]
        dist.broadcast_object_list(acts, src=0)
        return acts[0]

    def wait_for_all(self) -> None:
        """Wait for all ranks: what rank 0 has on its disk for the moment, all have read."""
        if self.size > 1:
            self.sum_over_ranks(torch.zeros(1))


ALONE = Ranks()


def choose_backend(device: str) -> str:
    """What torch's process group is made of: words between ranks always go by way of the CPU."""
    return "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"


def gather_whole(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor; all ranks at once."""
    return cast("DTensor", tensor).full_tensor() if is_sharded(tensor) else tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether this is torch's DTensor, of which a process has a shard."""
    return hasattr(tensor, "full_tensor")


def gather_stream(stream: TensorStream) -> TensorStream:
    """Gather the tensors of a stream one by one, as they are asked for; all ranks at once."""
    tensors = ((name, gather_whole(tensor)) for name, tensor in stream.tensors)
    return dataclasses.replace(stream, tensors=tensors)


def shard_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Copy `tensor` to where `parameter` is: all of it, or the shard that is ours."""
    moved = tensor.to(parameter.device, copy=True)
    if not is_sharded(parameter):
        return moved
    from torch.distributed.tensor import distribute_tensor

    sharded = cast("DTensor", parameter)
    return distribute_tensor(moved, sharded.device_mesh, sharded.placements, src_data_rank=None)
