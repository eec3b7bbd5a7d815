"""The optimizer under muP: groups by role, and clipping that does not depend on width."""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import AdamW, Optimizer

from warmcore.model.mup import Role, factors, role_of
from warmcore.specs import ClipRule, ModelSpec, TrainSpec
from warmcore.tensors.files import saving_order
from warmcore.training.muon import EPS as MUON_EPS
from warmcore.training.muon import MuonAdamW
from warmcore.training.ranks import gather_whole, shard_like

ADAM_KEYS = ("step", "exp_avg", "exp_avg_sq")
MUON_KEYS = ("momentum_buffer",)
ROLES: tuple[Role, ...] = ("embedding", "hidden", "gain", "final_gain", "unembedding")


def build_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]], model: ModelSpec, train: TrainSpec
) -> Optimizer:
    """Return AdamW (arXiv 1711.05101, decay by lr * wd), or AdamW and Muon, with a group per role.

    lr, weight decay and epsilon are the values of the spec times `mup.factors`. A group keeps its
    peak lr, for `set_lr` to scale.
    """
    named = list(named_parameters)
    groups: list[dict[str, object]] = []
    for role in ROLES:
        row = factors(role, model, train.optimizer)
        is_muon = role == "hidden" and train.optimizer == "muon"
        lr = train.lr * row.lr * (train.muon_lr_ratio if is_muon else 1.0)
        members = [(name, parameter) for name, parameter in named if role_of(name) == role]
        group: dict[str, object] = {
            "params": [parameter for _, parameter in members],
            "names": [name for name, _ in members],
            "role": role,
            "state_keys": MUON_KEYS if is_muon else ADAM_KEYS,
            "lr": lr,
            "peak_lr": lr,
            "weight_decay": train.weight_decay * row.weight_decay,
            "eps": (MUON_EPS if is_muon else train.eps) * row.eps,
        }
        groups.append(group)
    betas = (train.beta1, train.beta2)
    if train.optimizer == "muon":
        return MuonAdamW(groups, betas=betas, momentum=train.muon_momentum)
    return AdamW(groups, betas=betas, fused=True)


def set_lr(optimizer: Optimizer, factor: float) -> None:
    """Set every group to its peak lr times the schedule's factor."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


def vector_norm_weight(rule: ClipRule, model: ModelSpec) -> float:
    """Return the weight of a vector-like tensor's squared norm: m, or 1 for plain clipping."""
    return model.width_multiplier if rule == "width_weighted" else 1.0


def clip_gradients_(optimizer: Optimizer, weight: float, max_norm: float | None) -> Tensor:
    """Scale all gradients by min(1, max_norm / norm) and return the norm before.

    norm = sqrt(sum_hidden |g|^2 + weight * sum_vector |g|^2), METHOD §3 law 3. Vector-like tensors
    have a single width-sized dimension: embedding, unembedding and gains.
    """
    # Example: a model that is widened by copying from width 64 to 128 computes the same function.
    # The squared norm of its hidden gradients stays, and that of vector-like gradients halves.
    # With weight m, twice as large now, the sum stays, and both models clip at the same steps.
    groups = optimizer.param_groups
    hidden = [p.grad for g in groups if g["role"] == "hidden" for p in g["params"]]
    vector = [p.grad for g in groups if g["role"] != "hidden" for p in g["params"]]
    norm_vector = get_total_norm(vector, foreach=True) * math.sqrt(weight)
    # For sharded gradients torch returns a norm that is spread over the ranks.
    norm = torch.hypot(
        gather_whole(get_total_norm(hidden, foreach=True)), gather_whole(norm_vector)
    )
    if max_norm is not None:
        parameters = [p for g in groups for p in g["params"]]
        clip_grads_with_norm_(parameters, max_norm, norm, foreach=True)
    return norm


def optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """Return the state by name, `<parameter>.<key>`; empty before the first step."""
    tensors = {
        f"{name}.{key}": value
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
        for key, value in optimizer.state[parameter].items()
    }
    return {name: tensors[name] for name in sorted(tensors, key=saving_order)}


def load_optimizer_tensors(optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Set the state to copies of `tensors`: the inverse of `optimizer_tensors`."""
    # Without tensors the state of a parameter is empty, and its first step makes it.
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            optimizer.state[parameter] = {
                key: _place_state(key, tensors[f"{name}.{key}"], parameter)
                for key in group["state_keys"]
                if tensors
            }


def _place_state(key: str, tensor: Tensor, parameter: Tensor) -> Tensor:
    """Copy a moment to its parameter's device and shard; the number of steps is never sharded."""
    return (
        tensor.to(parameter.device, copy=True) if key == "step" else shard_like(tensor, parameter)
    )
