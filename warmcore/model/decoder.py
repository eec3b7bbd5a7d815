"""The decoder (METHOD §1): RMSNorm, RoPE, SwiGLU, grouped-query attention, untied unembedding.

Shapes: B batch, T positions, D width, N query heads, K key/value heads, H head dim,
F feed-forward width, V vocabulary.

Small models on a CPU are bound by the number and the memory traffic of the operations. Measured at
width 64, depth 4, 16 x 128 tokens, a single core: separate q, k, v matmuls are 8 % faster than a
matmul over concatenated weights (gate and up: 11 %), and rotating with `cat` is faster than complex
numbers and `roll`.
"""
# Shapes by suffix need capitals in names.
# ruff: noqa: N803, N806

from collections.abc import Iterable

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F  # noqa: N812 - its name everywhere
from torch.utils.checkpoint import checkpoint

from warmcore.model import fused
from warmcore.model.mup import draw_initial_, multipliers, role_of
from warmcore.specs import ModelSpec
from warmcore.tensors.row_blocks import fill_from_blocks, split_rows


class Linear(nn.Module):
    """A layer y = W x without a bias; `weight` is [out, in]. `init_weights_` must fill it."""

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_out, num_in))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Embedding(nn.Module):
    """A table of rows, `weight` [V, D], with a row per token."""

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, width))

    def forward(self, tokens_BT: Tensor) -> Tensor:
        return F.embedding(tokens_BT, self.weight)


class RMSNorm(nn.Module):
    """A normalization y = gain * x / sqrt(mean(x^2) + eps), arXiv 1910.07467."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        gain = self.weight if scale == 1.0 else self.weight * scale
        return F.rms_norm(x, gain.shape, gain, self.eps)


def rope_table(num_heads: int, head_dim: int, context: int, theta: float) -> Tensor:
    """Return cosines and sines of t * theta^(-2i/H), arXiv 2104.09864, as [3, T, N, H].

    The first of the three tables holds cosines, the second the sines that are added to the first
    half of a head, the third the sines that are added to the second half.
    """
    # As in Llama checkpoints, feature i pairs with i + H/2, and angles are rounded to float32.
    # Exact angles move logits by 4e-4 at position 4096 (docs/log.md). The table repeats for every
    # head: a row of activations [N, H] then meets a contiguous row of the table.
    # Example: H = 4 at angles (a, b) gives the rows (cos a, cos b, cos a, cos b),
    # (-sin a, -sin b, 0, 0) and (0, 0, sin a, sin b).

    # On the CPU even under the meta device: `arange` on the meta device imports 80 MB.
    pairs = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu")
    positions = torch.arange(context, dtype=torch.float32, device="cpu")
    angle = torch.outer(positions, 1.0 / theta ** (pairs / head_dim))
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    halves = ((cos, cos), (-sin, zero), (zero, sin))
    table_3TH = torch.stack([torch.cat(pair, dim=-1) for pair in halves])
    return table_3TH[:, :, None].repeat(1, 1, num_heads, 1)


def rotate_halves(x_BTNH: Tensor, table_3TNH: Tensor) -> Tensor:
    """Map (a, b) to (a cos - b sin, b cos + a sin), where a and b are the halves of a head."""
    a, b = x_BTNH.chunk(2, dim=-1)
    cos, to_first, to_second = table_3TNH[:, :, : x_BTNH.shape[2]]
    return torch.addcmul(x_BTNH * cos, torch.cat((b, a), dim=-1), to_first + to_second)


class Attention(nn.Module):
    """Causal attention per head: softmax(q k^T * scale) v.

    Query head i reads key/value head i // group_size.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.head_dim = spec.head_dim
        self.is_grouped = spec.group_size > 1
        self.scale = multipliers(spec).attention
        self.q = Linear(spec.width, spec.width)
        self.k = Linear(spec.width, spec.kv_width)
        self.v = Linear(spec.width, spec.kv_width)
        self.o = Linear(spec.width, spec.width)

    def split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))

    def forward(self, x_BTD: Tensor, rope_3TNH: Tensor) -> Tensor:
        q_BTNH = rotate_halves(self.split_heads(self.q(x_BTD)), rope_3TNH)
        k_BTKH = rotate_halves(self.split_heads(self.k(x_BTD)), rope_3TNH)
        return self.o(self.attend_causally(q_BTNH, k_BTKH, self.split_heads(self.v(x_BTD))))

    def attend_causally(self, q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor) -> Tensor:
        q_BNTH, k_BKTH, v_BKTH = (x.transpose(1, 2) for x in (q_BTNH, k_BTKH, v_BTKH))
        y_BNTH = F.scaled_dot_product_attention(
            q_BNTH,
            k_BKTH,
            v_BKTH,
            is_causal=True,
            scale=self.scale,
            enable_gqa=self.is_grouped,
        )
        return y_BNTH.transpose(1, 2).flatten(2)


class FeedForward(nn.Module):
    """A SwiGLU layer down(silu(gate x) * up x), arXiv 2002.05202."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.gate = Linear(spec.width, spec.ffn_width)
        self.up = Linear(spec.width, spec.ffn_width)
        self.down = Linear(spec.ffn_width, spec.width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x_BTD)) * self.up(x_BTD))


class Block(nn.Module):
    """A layer x + s attention(norm x), then x + s ffn(norm x), with s the residual multiplier."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.residual = multipliers(spec).residual
        self.attention_norm = RMSNorm(spec.width, spec.norm_eps)
        self.attention = Attention(spec)
        self.ffn_norm = RMSNorm(spec.width, spec.norm_eps)
        self.ffn = FeedForward(spec)

    def forward(self, x_BTD: Tensor, rope_3TNH: Tensor) -> Tensor:
        if fused.can_fuse(x_BTD):
            return self._forward_fused(x_BTD, rope_3TNH)
        y_BTD = self.attention(self.attention_norm(x_BTD), rope_3TNH)
        x_BTD = torch.add(x_BTD, y_BTD, alpha=self.residual)
        return torch.add(x_BTD, self.ffn(self.ffn_norm(x_BTD)), alpha=self.residual)

    def _forward_fused(self, x_BTD: Tensor, rope_3TNH: Tensor) -> Tensor:
        attention, norm = self.attention, self.attention_norm
        weights = (m.weight for m in (attention.q, attention.k, attention.v))
        qkv = fused.project_normed(x_BTD, norm.weight, norm.eps, rope_3TNH, *weights)
        y_BTD = attention.attend_causally(*(attention.split_heads(x) for x in qkv))
        x_BTD = fused.add_projection(x_BTD, y_BTD, attention.o.weight, scale=self.residual)
        ffn, norm = self.ffn, self.ffn_norm
        weights = (m.weight for m in (ffn.gate, ffn.up, ffn.down))
        return fused.add_swiglu(x_BTD, norm.weight, norm.eps, *weights, scale=self.residual)


class Decoder(nn.Module):
    """A model from tokens [B, T] to logits [B, T, V], for T up to `context`.

    With the targets [B, T] as a second argument it returns their mean cross entropy in nats, in
    float32 or float64. `init_weights_` or a state dict must fill the tensors first.
    """

    rope: Tensor

    def __init__(
        self, spec: ModelSpec, *, context: int, activation_checkpointing: bool = False
    ) -> None:
        super().__init__()
        self.activation_checkpointing = activation_checkpointing
        self.multipliers = multipliers(spec)
        self.embedding = Embedding(spec.vocab_size, spec.width)
        self.blocks = nn.ModuleList(Block(spec) for _ in range(spec.depth))
        self.final_norm = RMSNorm(spec.width, spec.norm_eps)
        self.unembedding = Linear(spec.width, spec.vocab_size)
        rope_3TNH = rope_table(spec.num_heads, spec.head_dim, context, spec.rope_theta)
        self.register_buffer("rope", rope_3TNH, persistent=False)

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self.rope.device

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor | None = None) -> Tensor:
        rope_3TNH = self.rope[:, : tokens_BT.shape[1]]
        x_BTD = self.embedding(tokens_BT)
        if self.multipliers.embedding != 1.0:
            x_BTD = x_BTD * self.multipliers.embedding
        for block in self.blocks:
            if self.activation_checkpointing:
                x_BTD = _recompute_in_backward(block, x_BTD, rope_3TNH)
            else:
                x_BTD = block(x_BTD, rope_3TNH)
        # Multiply the final gain by the logit multiplier: D products in place of B*T*V.
        norm, scale = self.final_norm, self.multipliers.logits
        if targets_BT is not None and fused.can_fuse(x_BTD):
            weights = (norm.weight * scale, norm.eps, self.unembedding.weight)
            return fused.compute_loss(x_BTD, *weights, targets_BT)
        logits_BTV = self.unembedding(norm(x_BTD, scale))
        if targets_BT is None:
            return logits_BTV
        logits_BTV = logits_BTV.to(torch.promote_types(logits_BTV.dtype, torch.float32))
        return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())


def _recompute_in_backward(block: nn.Module, *inputs: Tensor) -> Tensor:
    """Return `block(*inputs)`, and compute it again in the backward pass (arXiv 1604.06174)."""
    # A block draws no random numbers: no generator has to be restored.
    return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)


def init_weights_(model: Decoder, spec: ModelSpec, generator: Generator) -> Decoder:
    """Draw every tensor of `model`, in the order of the state dict."""
    # Block by block equals tensor by tensor: see `warmcore.tensors.row_blocks`.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            for rows in split_rows(parameter.shape):
                draw_initial_(parameter[rows], role_of(name), spec, generator)
    return model


def load_weights(model: Decoder, blocks: Iterable[tuple[str, Tensor]]) -> None:
    """Copy every tensor of the state dict from `blocks`, block by block."""
    with torch.no_grad():
        fill_from_blocks(dict(model.named_parameters()), blocks)


def parameter_shapes(spec: ModelSpec) -> dict[str, torch.Size]:
    """Return shapes by name, in the order of the state dict, without allocating tensors."""
    with torch.device("meta"):
        model = Decoder(spec, context=1)
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def loss_nats(model: nn.Module, window_BT1: Tensor) -> Tensor:
    """Return the mean cross entropy of the next tokens in windows [B, T + 1], in nats."""
    return model(window_BT1[:, :-1], window_BT1[:, 1:])
