"""Maximal update parametrization: a table of factors by role (METHOD §2).

Sources: arXiv 2203.03466 (muP), arXiv 2505.01618 Table 1 (CompleteP, epsilon and weight decay).
With m = n / n0 and l = L / L0 every factor is a power of m and l. At the base width and depth
(m = l = 1) all factors are exactly 1, and the model equals its standard-parametrization twin bit
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

With Muon for the hidden matrices, and all other roles as above:

=============  ============  ==============  ======  ====
hidden (Muon)  sigma/sqrt m  l^(a-1)/sqrt m  sqrt m  l^-a
=============  ============  ==============  ======  ====

Muon's update is lr c sqrt(max(fan_out, fan_in)) U V^T, where c sqrt(...) gives it the RMS of
AdamW's update (arXiv 2502.16982). The spectral norm of an update must be of the size of
sqrt(fan_out/fan_in) at every width (arXiv 2310.17813; for Muon arXiv 2512.05620). In a family
fan_out/fan_in does not depend on m, but the maximum grows with m. Hence lr goes by 1/sqrt m, and
weight decay by the inverse. In depth Muon is like Adam: the size of an update does not depend on
the size of the gradient, and l^-a on the branches suffices (arXiv 2603.00541). eps bounds the norm
of a gradient, and that norm does not depend on m.
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
    """The initial std of a role's tensors, and factors of lr, weight decay and eps."""

    init_std: float
    lr: float
    weight_decay: float
    eps: float


@dataclass(frozen=True, kw_only=True)
class Multipliers:
    """The four constants by which the forward pass multiplies."""

    embedding: float
    attention: float
    residual: float
    logits: float


def role_of(name: str) -> Role:
    """Return the role of a tensor, from its name in the model's state dict."""
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
    """Return a role's row of the tables above."""
    # Example: width 256 and depth 8 from base width 64 and depth 4, hence m = 4 and l = 2. A hidden
    # matrix under AdamW has init std sigma/2, lr 1/4, weight decay 4 and eps 1/8.
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
    """Return alpha_e, alpha_attn / sqrt(H), l^-a and alpha_out / m."""
    # Attention divides by sqrt(H) as in standard models, because muP here widens by adding heads
    # of the same head dim H. muP's 1/H is for head dims that grow.
    return Multipliers(
        embedding=model.embedding_multiplier,
        attention=model.attention_multiplier / math.sqrt(model.head_dim),
        residual=model.depth_multiplier**-DEPTH_ALPHA,
        logits=model.output_multiplier / model.width_multiplier,
    )


def draw_initial_(tensor: Tensor, role: Role, model: ModelSpec, generator: Generator) -> Tensor:
    """Overwrite `tensor` with initial values: N(0, init_std^2), or 1 for gains."""
    if role in GAINS:
        return tensor.fill_(1.0)
    std = factors(role, model).init_std
    return tensor.normal_(0.0, std, generator=generator) if std else tensor.zero_()
