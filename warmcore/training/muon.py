"""Muon for the hidden matrices and AdamW for all other tensors, in a single optimizer."""

from collections.abc import Sequence
from typing import Any

from torch.optim import AdamW, Muon, Optimizer

EPS = 1e-7  # added to the norm of the momentum, as in torch and in the author's code


class MuonAdamW(Optimizer):
    """An optimizer: B <- mu B + (1 - mu) G, then W <- (1 - lr wd) W - lr c NS(mu B + (1 - mu) G).

    NS is five Newton-Schulz steps towards U V^T of the argument U S V^T, in bfloat16 (Jordan,
    kellerjordan.github.io/posts/muon). c = 0.2 sqrt(max(fan_out, fan_in)) gives the update the RMS
    of AdamW's update, hence both take the same lr (arXiv 2502.16982).
    """

    # Each matrix is made orthogonal as a whole, q, k, v and o too: that commutes with copying
    # heads. Embedding, unembedding and gains stay with AdamW, because they have a side that
    # does not consist of features.

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        *,
        betas: tuple[float, float],
        momentum: float,
    ) -> None:
        hidden = [group for group in groups if group["role"] == "hidden"]
        others = [group for group in groups if group["role"] != "hidden"]
        self._parts = (
            Muon(hidden, momentum=momentum, adjust_lr_fn="match_rms_adamw"),
            AdamW(others, betas=betas, fused=True),
        )
        super().__init__([group for part in self._parts for group in part.param_groups], {})
        # A shared state: `optimizer_tensors` then reads the moments of both parts.
        for part in self._parts:
            part.state = self.state

    # The base class has an overload for each kind of closure. We never pass a closure.
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Do a step of both parts."""
        assert closure is None
        for part in self._parts:
            part.step()
