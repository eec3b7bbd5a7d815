"""Maximal update parametrization: one table, by role (METHOD §2).

Sources: arXiv 2203.03466 (muP), arXiv 2505.01618 Table 1 (CompleteP, epsilon and weight decay).
With m = n / n0 and l = L / L0 every factor is a power of m and l, so that at the base width and
depth (m = l = 1) all of them are exactly 1 and the model is its standard-parametrization twin, bit
for bit. a is CompleteP's alpha, 1: the learning rates then do not depend on depth.

=============  ============  ==========  ==  ==========  ===============================
role           init std      lr          wd  eps         forward
=============  ============  ==========  ==  ==========  ===============================
embedding      sigma_e       1           1   1/m         x alpha_e
hidden         sigma/sqrt m  l^(a-1)/m   m   l^-a/m      attention logits x alpha_attn/sqrt(H)
gain           0 (all ones)  l^(a-1)     0   l^-a/m      output of its block's branch x l^-a
final_gain     0 (all ones)  1           0   1/m
unembedding    sigma_u       1           1   1/m         logits x alpha_out/m
=============  ============  ==========  ==  ==========  ===============================

With Muon for the hidden matrices, everything else as above:

=============  ============  ==============  ======  ====
hidden (Muon)  sigma/sqrt m  l^(a-1)/sqrt m  sqrt m  l^-a
=============  ============  ==============  ======  ====

Muon's update is lr c sqrt(max(fan_out, fan_in)) U V^T, with c sqrt(...) for the RMS of AdamW's
(arXiv 2502.16982). Its spectral norm must be of the size of sqrt(fan_out/fan_in) at every width
(arXiv 2310.17813; for Muon arXiv 2512.05620): fan_out/fan_in does not depend on m in a family, but
the maximum grows with it, so lr goes by 1/sqrt m, and weight decay by its inverse. In depth Muon is
as Adam: an update's size does not depend on the gradient's, and l^-a on the branches is all that is
needed (arXiv 2603.00541). eps bounds the norm of a gradient, which does not depend on m.
"""

import math
from dataclasses import dataclass
from typing import Literal

from torch import Generator, Tensor

from warmcore.specs.model import ModelSpec
from warmcore.specs.train import OptimizerName

Role = Literal["embedding", "hidden", "gain", "final_gain", "unembedding"]
GAINS: frozenset[Role] = frozenset({"gain", "final_gain"})
DEPTH_ALPHA = 1.0


@dataclass(frozen=True, kw_only=True)
class Factors:
    """What a role's tensors are scaled by: an initial std, and factors of lr, wd and eps."""

    init_std: float
    lr: float
    weight_decay: float
    eps: float


@dataclass(frozen=True, kw_only=True)
class Multipliers:
    """What the forward pass is scaled by, at four places."""

    embedding: float
    attention: float
    residual: float
    logits: float


def role_of(name: str) -> Role:
    """Role of a tensor, from its name in the model's state dict."""
    match name.split("."):
        case ["embedding", "weight"]:
            return "embedding"
        case ["unembedding", "weight"]:
            return "unembedding"
        case ["final_norm", "weight"]:
            return "final_gain"
        case ["blocks", _, "attention_norm" | "ffn_norm", "weight"]:
            return "gain"
        case ["blocks", _, "attention" | "ffn", _, "weight"]:
            return "hidden"
        case _:
            raise ValueError(f"{name} is not the name of a tensor of this model family")


def factors(role: Role, model: ModelSpec, optimizer: OptimizerName = "adamw") -> Factors:
    """Look a role's row up in the tables above."""
    m, depth = model.width_multiplier, model.depth_multiplier
    block_lr, block_eps = depth ** (DEPTH_ALPHA - 1), depth**-DEPTH_ALPHA / m
    match role:
        case "embedding":
            return Factors(init_std=model.embedding_std, lr=1.0, weight_decay=1.0, eps=1 / m)
        case "hidden":
            std, root = model.init_std / math.sqrt(m), math.sqrt(m)
            if optimizer == "muon":
                eps = depth**-DEPTH_ALPHA
                return Factors(init_std=std, lr=block_lr / root, weight_decay=root, eps=eps)
            return Factors(init_std=std, lr=block_lr / m, weight_decay=m, eps=block_eps)
        case "gain":
            return Factors(init_std=0.0, lr=block_lr, weight_decay=0.0, eps=block_eps)
        case "final_gain":
            return Factors(init_std=0.0, lr=1.0, weight_decay=0.0, eps=1 / m)
        case "unembedding":
            return Factors(init_std=model.unembedding_std, lr=1.0, weight_decay=1.0, eps=1 / m)


def multipliers(model: ModelSpec) -> Multipliers:
    """alpha_e; alpha_attn / sqrt(H), as head dim H is fixed; l^-a; alpha_out / m."""
    return Multipliers(
        embedding=model.embedding_multiplier,
        attention=model.attention_multiplier / math.sqrt(model.head_dim),
        residual=model.depth_multiplier**-DEPTH_ALPHA,
        logits=model.output_multiplier / model.width_multiplier,
    )


def draw_initial_(tensor: Tensor, role: Role, model: ModelSpec, generator: Generator) -> Tensor:
    """Overwrite `tensor` with its initial value: N(0, init_std^2), and ones for gains."""
    if role in GAINS:
        return tensor.fill_(1.0)
    std = factors(role, model).init_std
    return tensor.normal_(0.0, std, generator=generator) if std else tensor.zero_()
