"""Muon for the hidden matrices and AdamW for everything else, as one optimizer."""

from collections.abc import Sequence
from typing import Any

from torch.optim import AdamW, Muon, Optimizer

EPS = 1e-7  # of the momentum's norm; torch's and the author's


class MuonAdamW(Optimizer):
    """B <- mu B + (1 - mu) G, then W <- (1 - lr wd) W - lr c NS(mu B + (1 - mu) G).

    NS is five Newton-Schulz steps to U V^T of the argument U S V^T (Jordan,
    kellerjordan.github.io/posts/muon), in bfloat16; c = 0.2 sqrt(max(fan_out, fan_in)) gives the
    update the RMS of AdamW's, so that both take one lr (arXiv 2502.16982). Each matrix is made
    orthogonal as a whole, also q, k, v and o: that commutes with copying heads.

    Embedding, unembedding and gains are AdamW's: their sides are not both features.
    """

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
        for part in self._parts:
            part.state = self.state

    # The base class has an overload for each kind of closure; ours are none.
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Step both."""
        assert closure is None
        for part in self._parts:
            part.step()
