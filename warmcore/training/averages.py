"""Averages of a run's weights, beside them: functions of the path, of which nothing changes.

a_t = a_{t-1} + w_t (theta_t - a_{t-1}) after step t, with w = 1 where an average begins. Each holds
4 bytes per parameter in memory and in checkpoints; to be evaluated it changes places with the
weights, one tensor at a time.
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
    """w_t = 1 - (1 - 1/t)^p with p = ln 2 / -ln(1 - h): half of a_T is of the last h T steps.

    The power function average of arXiv 2312.02696 (section 3.1): products of 1 - w telescope, so
    that steps up to t weigh (t/T)^p. Other than a constant decay it has the same shape at every
    budget and forgets the initial weights; and as w_t does not know T, a trunk's is its branches'.
    """
    return 1.0 - (1.0 - 1.0 / step) ** (math.log(2) / -math.log1p(-half_life))


def swa_weight(step: int, num_steps: int, fraction: float) -> float | None:
    """1/k at the k-th of the last ceil(f T) steps, before them none: arXiv 1803.05407, 2405.18392.

    An equal average of the weights after each of those steps.
    """
    place = step - (num_steps - math.ceil(fraction * num_steps))
    return 1.0 / place if place > 0 else None


@dataclass(kw_only=True)
class Averages:
    """The averages that a run asks for, by name, as far as they have begun."""

    train: TrainSpec
    num_steps: int
    tensors: dict[AverageName, Tensors] = field(default_factory=dict[AverageName, Tensors])

    def list_weights(self, step: int) -> dict[AverageName, float]:
        """What the weights after `step` steps weigh in each average that has begun by then."""
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
        """Take in the model's weights after `step` steps."""
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
        """Take a checkpoint's averages in place of these, each tensor to where its weights are."""
        parameters = dict(model.named_parameters())
        self.tensors = {
            name: {key: shard_like(tensor, parameters[key]) for key, tensor in tensors.items()}
            for name, tensors in saved.items()
        }

    @contextmanager
    def swap_with_weights(self, name: AverageName, model: nn.Module) -> Generator[None]:
        """Let `model` have this average as its weights, and have its own back afterwards."""
        self._exchange_tensors(name, model)
        try:
            yield
        finally:
            self._exchange_tensors(name, model)

    @torch.no_grad()
    def _exchange_tensors(self, name: AverageName, model: nn.Module) -> None:
        for key, parameter in model.named_parameters():
            average = self.tensors[name][key]
            held = parameter.clone()
            parameter.copy_(average)
            average.copy_(held)
