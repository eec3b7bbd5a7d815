"""Branches of the decoder with backward passes of their own, for float32 and float64 on a CPU.

A small model on a CPU waits for memory: autograd's compositions read, allocate and keep each
activation several times. The functions here read less, sum inside the matrix products, and keep
only tensors that the backward pass cannot quickly compute again. CUDA, autocast and `torch.compile`
fuse by themselves: there, and inside `disable_fused()`, the modules' compositions are used.
Measured by `benchmarks/train_throughput.py`. Splitting a branch into pieces that fit the cache
gained nothing (docs/log.md). Only the logits are computed in pieces, because they can be large.

Shapes: B batch, T positions, D width, N heads, H head dim, F feed-forward width, V vocabulary; R
rows, that is, B and T in one axis.
"""

# Shapes by suffix need capitals in names. A Function's signature is (context, any arguments).
# ruff: noqa: N803, N806, PLR0917
# pyright: reportIncompatibleMethodOverride=false

from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F  # noqa: N812 - its name everywhere

_DTYPES = (torch.float32, torch.float64)
_IS_ON = ContextVar("fused", default=True)
_LOGITS = 2**22  # logits in memory at a time: 16 MB in float32

Grads = tuple[Tensor | None, ...]


def can_fuse(x: Tensor) -> bool:
    """Return whether the functions of this module apply to activations like `x`."""
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    return x.is_cpu and x.dtype in _DTYPES and _IS_ON.get()


@contextmanager
def disable_fused() -> Generator[None]:
    """Use the modules' compositions inside the context: hooks then see each module's output."""
    token = _IS_ON.set(False)
    try:
        yield
    finally:
        _IS_ON.reset(token)


def project_normed(
    x_BTD: Tensor, gain_D: Tensor, eps: float, table_3TNH: Tensor, *qkv: Tensor
) -> tuple[Tensor, ...]:
    """Return W h for three weights [out, D], h = norm(x); q and k are rotated by position."""
    outs = _NormedProjections.apply(x_BTD, gain_D, eps, table_3TNH, *qkv)
    return cast("tuple[Tensor, ...]", outs)


def add_projection(x_BTD: Tensor, y_BTD: Tensor, weight: Tensor, *, scale: float) -> Tensor:
    """Return x + scale W y."""
    return torch.addmm(_flatten_rows(x_BTD), _flatten_rows(y_BTD), weight.t(), alpha=scale).view_as(
        x_BTD
    )


def add_swiglu(
    x_BTD: Tensor, gain_D: Tensor, eps: float, *gate_up_down: Tensor, scale: float
) -> Tensor:
    """Return x + scale down(silu(gate h) * up h), h = norm(x); arXiv 2002.05202."""
    return cast("Tensor", _AddSwiGLU.apply(x_BTD, gain_D, eps, scale, *gate_up_down))


def compute_loss(
    x_BTD: Tensor, gain_D: Tensor, eps: float, unembedding_VD: Tensor, targets_BT: Tensor
) -> Tensor:
    """Return the mean of -log softmax(W norm(x))[target], in nats."""
    mean = _Loss.apply(x_BTD, gain_D, eps, unembedding_VD, targets_BT, torch.is_grad_enabled())
    return cast("Tensor", mean)


class _NormedProjections(Function):
    @staticmethod
    def forward(
        ctx: Any, x_BTD: Tensor, gain_D: Tensor, eps: float, table_3TNH: Tensor, *qkv: Tensor
    ) -> tuple[Tensor, ...]:
        inverse_R1 = _compute_inverse_rms(_flatten_rows(x_BTD), eps)
        ctx.save_for_backward(x_BTD, gain_D, inverse_R1, table_3TNH, *qkv)
        h_RD = (_flatten_rows(x_BTD) * inverse_R1).mul_(gain_D)
        q, k, v = (F.linear(h_RD, weight).view(*x_BTD.shape[:2], -1) for weight in qkv)
        return _rotate_flat(q, table_3TNH, 1), _rotate_flat(k, table_3TNH, 1), v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Grads:
        """Rotate back, then dh = sum_i dy_i W_i and dW_i = dy_i^T h, then through the norm."""
        # h = g n is not kept. Instead of h the product takes n = x / rms, and the gain scales its
        # columns afterwards: dW = dy^T (n g) = (dy^T n) g. That saves a pass over [R, D]. Example:
        # at 16 x 128 tokens and width 64, h has 131 072 elements and dW 4 096.
        x_BTD, gain_D, inverse_R1, table_3TNH, *qkv = ctx.saved_tensors
        dq, dk = (_rotate_flat(grad, table_3TNH, -1) for grad in grads[:2])
        dys = [_flatten_rows(dy) for dy in (dq, dk, grads[2])]
        n_RD = _flatten_rows(x_BTD) * inverse_R1
        dweights = [(dy.t() @ n_RD).mul_(gain_D) for dy in dys]
        dx_RD, dgain = _backpropagate_norm(_sum_products(dys, qkv), n_RD, gain_D, inverse_R1)
        return dx_RD.view_as(x_BTD), dgain, None, None, *dweights


class _AddSwiGLU(Function):
    @staticmethod
    def forward(
        ctx: Any, x_BTD: Tensor, gain_D: Tensor, eps: float, scale: float, *weights: Tensor
    ) -> Tensor:
        gate, up, down = weights
        x_RD = _flatten_rows(x_BTD)
        inverse_R1 = _compute_inverse_rms(x_RD, eps)
        h_RD = (x_RD * inverse_R1).mul_(gain_D)
        gate_RF, up_RF = F.linear(h_RD, gate), F.linear(h_RD, up)
        ctx.save_for_backward(x_BTD, gain_D, inverse_R1, gate_RF, up_RF, *weights)
        ctx.scale = scale
        a_RF = F.silu(gate_RF).mul_(up_RF)
        # For FSDP the output of a block must not be a view: make it first, then write to it.
        y_BTD = x_BTD.new_empty(x_BTD.shape)
        torch.addmm(x_RD, a_RF, down.t(), alpha=scale, out=y_BTD.view_as(x_RD))
        return y_BTD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Grads:
        """Add the gradient through the branch to dy; compute the norm and silu again."""
        # With s = silu(gate) and a = s up: da = scale dy W_down, dup = s da, dgate = silu'(gate)
        # up da. After its last use `silu_RF` becomes a, and `da_RF` becomes dgate: this pass
        # allocates three tensors [R, F] (silu, da, dup) for five results.
        x_BTD, gain_D, inverse_R1, gate_RF, up_RF, gate, up, down = ctx.saved_tensors
        dy_RD = _flatten_rows(grads[0])
        silu_RF, da_RF = F.silu(gate_RF), _multiply_scaled(dy_RD, down, ctx.scale)
        dup_RF = silu_RF * da_RF
        ddown = _multiply_scaled(dy_RD.t(), silu_RF.mul_(up_RF), ctx.scale)
        dgate_RF = da_RF.mul_(up_RF)
        torch.ops.aten.silu_backward.grad_input(dgate_RF, gate_RF, grad_input=dgate_RF)
        n_RD = _flatten_rows(x_BTD) * inverse_R1
        dgate, dup = ((dy_RF.t() @ n_RD).mul_(gain_D) for dy_RF in (dgate_RF, dup_RF))
        dh_RD = _sum_products([dgate_RF, dup_RF], [gate, up])
        dx_RD, dgain = _backpropagate_norm(dh_RD, n_RD, gain_D, inverse_R1)
        return dx_RD.add_(dy_RD).view_as(x_BTD), dgain, None, None, dgate, dup, ddown


class _Loss(Function):
    """The mean cross entropy with its gradient, without all logits in memory at once."""

    # The forward pass computes the gradient too: each piece of logits is in memory only then.
    # With p = softmax(logits) the gradient is d = (p - onehot(target)) / R. Example: vocabulary
    # 32 768 gives pieces of 128 rows, 16 MB; all logits of 16 x 128 rows would take 268 MB.

    @staticmethod
    def forward(
        ctx: Any, x_BTD: Tensor, gain_D: Tensor, eps: float, weight_VD: Tensor,
        targets_BT: Tensor, is_training: bool,  # noqa: FBT001 - `apply` takes no keywords
    ) -> Tensor:  # fmt: skip
        x_RD, targets_R1 = _flatten_rows(x_BTD), targets_BT.reshape(-1, 1)
        inverse_R1 = _compute_inverse_rms(x_RD, eps)
        n_RD = x_RD * inverse_R1
        h_RD = n_RD * gain_D
        dh_RD, dweight_VD = torch.empty_like(h_RD), torch.zeros_like(weight_VD)
        total = x_BTD.new_zeros(())
        for at in _split_for_logits(x_RD, weight_VD):
            logp_RV = torch.log_softmax(F.linear(h_RD[at], weight_VD), -1)
            total -= logp_RV.gather(1, targets_R1[at]).sum()
            if is_training:
                d_RV = logp_RV.exp_().div_(len(x_RD))
                minus = d_RV.new_full((), -1 / len(x_RD)).expand(len(d_RV), 1)
                d_RV.scatter_add_(1, targets_R1[at], minus)
                dweight_VD.addmm_(d_RV.t(), h_RD[at])
                torch.mm(d_RV, weight_VD, out=dh_RD[at])
        if is_training:
            dx_RD, dgain = _backpropagate_norm(dh_RD, n_RD, gain_D, inverse_R1)
            ctx.save_for_backward(dx_RD.view_as(x_BTD), dgain, dweight_VD)
        return total.div_(len(x_RD))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Grads:
        """Return the gradients of the forward pass times the gradient of the loss."""
        dx_BTD, dgain, dweight_VD = (saved * grads[0] for saved in ctx.saved_tensors)
        return dx_BTD, dgain, None, dweight_VD, None, None


def _compute_inverse_rms(x_RD: Tensor, eps: float) -> Tensor:
    """Return 1 / sqrt(mean(x^2) + eps), [R, 1]."""
    norm_R1 = torch.linalg.vector_norm(x_RD, dim=-1, keepdim=True)
    return norm_R1.square_().div_(x_RD.shape[-1]).add_(eps).rsqrt_()


def _backpropagate_norm(
    dh_RD: Tensor, n_RD: Tensor, gain_D: Tensor, inverse_R1: Tensor
) -> tuple[Tensor, Tensor]:
    """Return dx = r (g dh - n mean(g dh n)) and dg = sum_R dh n; overwrite dh and n."""
    # h = g n with n = x r and r = 1 / rms(x). The second term is the gradient through r.
    # Example: for D = 1, n is +-1 for every x, and dx is 0 up to eps.
    product_RD = dh_RD * n_RD
    mean_R1 = (product_RD @ gain_D).div_(len(gain_D)).unsqueeze(-1)
    dx_RD = dh_RD.mul_(gain_D).sub_(n_RD.mul_(mean_R1)).mul_(inverse_R1)
    return dx_RD, product_RD.sum(0)


def _multiply_scaled(a: Tensor, b: Tensor, scale: float) -> Tensor:
    return torch.addmm(a.new_empty(()), a, b, beta=0, alpha=scale)


def _sum_products(dys: list[Tensor], weights: list[Tensor]) -> Tensor:
    total = dys[0] @ weights[0]
    for dy, weight in zip(dys[1:], weights[1:], strict=True):
        total.addmm_(dy, weight)
    return total


def _rotate_flat(y_BTD: Tensor, table_3TNH: Tensor, sign: int) -> Tensor:
    """Map the halves (a, b) of each head to (a cos - b sin, b cos + a sin); sign -1 undoes it."""
    # Shift the whole row of heads by half a head, in place of splitting each head. A shift also
    # brings in elements of the neighbouring head; the zeros of `rope_table` cancel these products.
    # Example: heads of 4, row (a1 b1 | a2 b2) in halves. Shifted to the right it is (0 a1 | b1 a2):
    # the third table (0 sin | 0 sin) keeps a1 and a2 for the second halves, and drops b1.
    half = table_3TNH.shape[-1] // 2
    num_heads = y_BTD.shape[-1] // table_3TNH.shape[-1]
    cos, to_first, to_second = table_3TNH[:, :, :num_heads].flatten(1)
    y_flat = y_BTD.reshape(len(y_BTD), -1)
    out = y_flat * cos
    out[:, half:].addcmul_(y_flat[:, :-half], to_second[half:], value=sign)
    out[:, :-half].addcmul_(y_flat[:, half:], to_first[:-half], value=sign)
    return out.view(y_BTD.shape)


def _flatten_rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _split_for_logits(rows: Tensor, weight_VD: Tensor) -> list[slice]:
    size = max(1, _LOGITS // len(weight_VD))
    return [slice(at, at + size) for at in range(0, len(rows), size)]
