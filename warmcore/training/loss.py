"""The loss and its gradient: in which precision, in how many parts, compiled or not."""

import os
import shlex
import shutil
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

from warmcore.model.decoder import loss_nats
from warmcore.specs import Precision

LossFunction = Callable[[nn.Module, Tensor], Tensor]


class CompilerMissingError(Exception):
    """A run is to be compiled on a machine that cannot; another one may."""


def choose_loss(precision: Precision) -> LossFunction:
    """`loss_nats`; for bf16 with matrix products and attention in bfloat16 (autocast).

    The residual stream, norms, the softmax and the loss stay float32, as do weights, gradients and
    the optimizer (mixed precision, arXiv 1710.03740; bfloat16 has float32's range, so that no loss
    is to be scaled: arXiv 1905.12322).
    """
    match precision:
        case "float32":
            return loss_nats
        case "bf16":
            return _loss_nats_bf16


def _loss_nats_bf16(model: nn.Module, window_BT1: Tensor) -> Tensor:  # noqa: N803 - shapes as in model
    with torch.autocast(window_BT1.device.type, dtype=torch.bfloat16):
        return loss_nats(model, window_BT1)


def compile_loss(loss_of: LossFunction, device: torch.device) -> LossFunction:
    """`loss_of` through torch.compile: for one shape of windows, whole or an error.

    Weights keep their names, since it is the function that is compiled. What this process compiled
    for other runs is dropped: their models would count against the limit of recompilations, beyond
    which torch falls back to running uncompiled.

    Raises:
        CompilerMissingError: no compiler, which torch would notice at the first step.
    """
    kind, variable, names = _list_compilers(device)
    if not any(shutil.which(shlex.split(name)[0]) for name in names):
        raise CompilerMissingError(
            f"compile is true, but there is no {kind} compiler {' or '.join(names)} on this "
            f"machine; install one, name another in {variable}, or set compile to false"
        )
    torch.compiler.reset()
    return torch.compile(loss_of, fullgraph=True, dynamic=False)


def _list_compilers(device: torch.device) -> tuple[str, str, list[str]]:
    """What torch's inductor looks for: on a CPU it writes C++, on a GPU triton a launcher in C."""
    if device.type == "cpu":
        return (
            "C++",
            "CXX",
            [os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")],
        )
    return "C", "CC", [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]


def accumulate_gradients(
    loss_of: LossFunction, model: nn.Module, batch: Tensor, *, parts: int
) -> Tensor:
    """Mean loss of `batch`, whose gradient is added to the weights', in equal `parts`.

    mean_B l = (1/p) sum_i mean_{B_i} l, and so for the gradients; only one part's activations are
    held at a time.
    """
    losses: list[Tensor] = []
    for part in batch.chunk(parts):
        loss = loss_of(model, part) / parts
        loss.backward()
        losses.append(loss.detach())
    return torch.stack(losses).sum()
