"""Running averages of the weights (EMA, SWA), computed beside the training without influence on it.

a_t = a_{t-1} + w_t (theta_t - a_{t-1}) after step t, with w = 1 where an average begins. An average
takes 4 bytes per parameter in memory and in checkpoints. For an evaluation it is exchanged with the
weights, tensor by tensor.
"""

import math
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from warmcore.specs import AverageName, TrainSpec
from warmcore.training.ranks import shard_like

Tensors = dict[str, Tensor]


def ema_weight(step: int, half_life: float) -> float:
    """Return w_t = 1 - (1 - 1/t)^p with p = ln 2 / -ln(1 - h).

    Half of the weight of a_T is on the last h T steps. The power function average of arXiv
    2312.02696 (section 3.1): products of 1 - w telescope, hence steps up to t weigh (t/T)^p.
    """
    # Unlike a constant decay, it has the same shape at every budget and forgets the initial
    # weights. w_t does not depend on T: a trunk's average is also the average of each branch.
    return 1.0 - (1.0 - 1.0 / step) ** (math.log(2) / -math.log1p(-half_life))


def swa_weight(step: int, num_steps: int, fraction: float) -> float | None:
    """Return 1/k at the k-th of the last ceil(f T) steps, and None before those steps.

    The result is the plain mean of the weights after each of those steps (arXiv 1803.05407,
    2405.18392).
    """
    # Example: T = 100 and f = 0.3. Step 71 begins the average with weight 1, step 72 enters with
    # 1/2, and step 100 with 1/30.
    place = step - (num_steps - math.ceil(fraction * num_steps))
    return 1.0 / place if place > 0 else None


@dataclass(kw_only=True)
class Averages:
    """The averages that a run's spec names, as far as they have begun."""

    train: TrainSpec
    num_steps: int
    tensors: dict[AverageName, Tensors] = field(default_factory=dict[AverageName, Tensors])

    def list_weights(self, step: int) -> dict[AverageName, float]:
        """Return w_t at t = `step` for each average that has begun by then."""
        train = self.train
        weights: dict[AverageName, float | None] = {
            "ema": ema_weight(step, train.ema_half_life) if train.ema_half_life else None,
            "swa": swa_weight(step, self.num_steps, train.swa_fraction)
            if train.swa_fraction
            else None,
        }
        return {name: weight for name, weight in weights.items() if weight is not None}

    @torch.no_grad()
    def update_averages_(self, model: nn.Module, step: int) -> None:
        """Add the model's weights after `step` steps to each average."""
        for name, weight in self.list_weights(step).items():
            averages = self.tensors.setdefault(name, {})
            for key, parameter in model.named_parameters():
                if weight == 1.0:
                    averages[key] = parameter.detach().clone()
                else:
                    averages[key].lerp_(parameter, weight)

    def load_tensors(
        self, saved: Mapping[AverageName, Mapping[str, Tensor]], model: nn.Module
    ) -> None:
        """Replace the averages by a checkpoint's; each tensor goes to the device of its weights."""
        parameters = dict(model.named_parameters())
        self.tensors = {
            name: {key: shard_like(tensor, parameters[key]) for key, tensor in tensors.items()}
            for name, tensors in saved.items()
        }

    @contextmanager
    def swap_with_weights(self, name: AverageName, model: nn.Module) -> Generator[None]:
        """Exchange `model`'s weights with this average inside the context, and back after it."""
        self._exchange_tensors(name, model)
        try:
            yield
        finally:
            self._exchange_tensors(name, model)

    # Tensor by tensor: a copy of the whole model would raise the memory of every evaluation.
    @torch.no_grad()
    def _exchange_tensors(self, name: AverageName, model: nn.Module) -> None:
        for key, parameter in model.named_parameters():
            average = self.tensors[name][key]
            raw = parameter.clone()
            parameter.copy_(average)
            average.copy_(raw)
