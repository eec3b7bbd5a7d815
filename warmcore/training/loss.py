"""The loss and its gradient: precision, accumulation in parts, compilation."""

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
    """No compiler on this machine for a run with `compile`; another machine may have it."""


def choose_loss(precision: Precision) -> LossFunction:
    """Return `loss_nats`; for bf16 with matrix products and attention in bfloat16 (autocast).

    The residual stream, norms, the softmax and the loss stay float32, and likewise weights,
    gradients and the optimizer (mixed precision, arXiv 1710.03740).
    """
    # bfloat16 has float32's range: the loss needs no scaling (arXiv 1905.12322).
    match precision:
        case "float32":
            return loss_nats
        case "bf16":
            return _loss_nats_bf16


def _loss_nats_bf16(model: nn.Module, window_BT1: Tensor) -> Tensor:  # noqa: N803 - shapes as in model
    with torch.autocast(window_BT1.device.type, dtype=torch.bfloat16):
        return loss_nats(model, window_BT1)


def compile_loss(loss_of: LossFunction, device: torch.device) -> LossFunction:
    """Return `loss_of` through torch.compile: a single graph for windows of a single shape.

    Weights keep their names, because the function is compiled and not the model.

    Raises:
        CompilerMissingError: no compiler is found; torch would raise only at the first step.
    """
    kind, variable, names = _list_compilers(device)
    if not any(shutil.which(shlex.split(name)[0]) for name in names):
        raise CompilerMissingError(
            f"compile is true, but there is no {kind} compiler {' or '.join(names)} on this "
            f"machine; install one, name another in {variable}, or set compile to false"
        )
    # Drop the graphs of this process's earlier runs. They would count against torch's limit of
    # recompilations, and beyond the limit torch runs uncompiled.
    torch.compiler.reset()
    return torch.compile(loss_of, fullgraph=True, dynamic=False)


def _list_compilers(device: torch.device) -> tuple[str, str, list[str]]:
    """Return the language, the environment variable and the programs that torch tries."""
    # For a CPU inductor writes C++. For a GPU triton writes a launcher in C.
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
    """Add the gradient of `batch` to the weights' gradients and return the mean loss in nats.

    mean_B l = (1/p) sum_i mean_{B_i} l over p equal parts B_i, and the same for the gradients. Only
    the activations of a single part are in memory at a time.
    """
    losses: list[Tensor] = []
    for part in batch.chunk(parts):
        loss = loss_of(model, part) / parts
        loss.backward()
        losses.append(loss.detach())
    return torch.stack(losses).sum()
