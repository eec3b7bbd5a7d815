"""AdamW under muP: parameter groups from the table, and clipping that does not depend on width."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from warmcore.mup import Role, factors, role_of
from warmcore.spec import ClipRule, ModelSpec, TrainSpec

ROLES: tuple[Role, ...] = ("embedding", "hidden", "gain", "unembedding")


def build_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]], model: ModelSpec, train: TrainSpec
) -> AdamW:
    """AdamW (arXiv 1711.05101, decay by lr * wd) with one group per role.

    lr, weight decay and epsilon are the spec's times the factors of `mup.factors`; a group keeps
    its own peak lr, which `set_lr` scales.
    """
    named = list(named_parameters)
    groups: list[dict[str, object]] = []
    for role in ROLES:
        row = factors(role, model)
        group: dict[str, object] = {
            "params": [parameter for name, parameter in named if role_of(name) == role],
            "role": role,
            "lr": train.lr * row.lr,
            "peak_lr": train.lr * row.lr,
            "weight_decay": train.weight_decay * row.weight_decay,
            "eps": train.eps * row.eps,
        }
        groups.append(group)
    return AdamW(groups, betas=(train.beta1, train.beta2), fused=True)


def set_lr(optimizer: AdamW, factor: float) -> None:
    """Set every group to its peak lr times the schedule's factor."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


def vector_weight(rule: ClipRule, model: ModelSpec) -> float:
    """Weight of a vector-like tensor's squared norm: m, or 1 for plain clipping."""
    return model.width_multiplier if rule == "width_weighted" else 1.0


def grad_norm(optimizer: AdamW, weight: float) -> Tensor:
    """sqrt(sum_hidden |g|^2 + weight * sum_vector |g|^2), METHOD §3 law 3.

    Vector-like are the tensors with one width-sized dimension: embedding, unembedding and gains.
    When a model is widened by copying, their squared norm shrinks with the ratio; with weight m
    the norm, and so the clipping, stays as it was.
    """
    gradients: list[Tensor] = []
    weights: list[float] = []
    for group in optimizer.param_groups:
        present = [p.grad for p in group["params"] if p.grad is not None]
        gradients += present
        weights += [1.0 if group["role"] == "hidden" else math.sqrt(weight)] * len(present)
    norms = torch.stack(torch._foreach_norm(gradients))  # noqa: SLF001 - the public one is unweighted
    return torch.linalg.vector_norm(norms * norms.new_tensor(weights))


def clip_(optimizer: AdamW, norm: float, max_norm: float) -> None:
    """Scale every gradient by min(1, max_norm / norm), in one pass."""
    if norm > max_norm:
        gradients = [
            p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None
        ]
        torch._foreach_mul_(gradients, max_norm / norm)  # noqa: SLF001 - the public one needs a tensor norm
