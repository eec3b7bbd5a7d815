"""Coordinate check (arXiv 2203.03466, appendix D.1): do activations stay in place as models grow?

Under muP mean |x| after a few steps does not depend on width, so that the slope of log mean |x|
against log n is 0 for every kind of layer; under CompleteP (arXiv 2505.01618) the same holds of
depth. Under standard parametrization neither does.

The sum of what L branches are drawn with falls as 1/sqrt(L) under CompleteP, by design: in depth
the stream is flat once what was learned outweighs it, by its steps or by a small `init_std`.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Generator, Tensor

from warmcore.corpus.prepare import Tokens
from warmcore.model import fused
from warmcore.model.decoder import Decoder, init_weights_, loss_nats
from warmcore.specs import ModelSpec, TrainSpec
from warmcore.specs.coord_check import KINDS, Axis, AxisCheck, Kind
from warmcore.training.batches import read_train_batch
from warmcore.training.optimizer import build_optimizer

log = logging.getLogger(__name__)
Sizes = dict[Kind, float]


@dataclass(frozen=True, kw_only=True)
class CheckSetup:
    """How the models of a check are trained: `num_steps` at constant lr, once per seed."""

    tokens: Tokens
    train: TrainSpec
    context: int
    num_steps: int
    num_seeds: int
    device: str = "cpu"


def check_axis(setup: CheckSetup, model: ModelSpec, axis: Axis, sizes: Sequence[int]) -> AxisCheck:
    """Train `model` at each size and average over seeds.

    Raises:
        ValueError: a size that the model cannot have, or training that left the finite numbers.
    """
    by_size = [
        _average_over_seeds(setup, spec) for spec in [resize_model(model, axis, n) for n in sizes]
    ]
    steps = range(setup.num_steps + 1)
    means: dict[Kind, list[list[float]]] = {
        kind: [[sized[step][kind] for sized in by_size] for step in steps] for kind in KINDS
    }
    return AxisCheck.from_means(axis, sizes, means)


def resize_model(model: ModelSpec, axis: Axis, size: int) -> ModelSpec:
    """The model at another size; what a missing base width or depth stood for is kept."""
    base = {"base_width": model.base_width or model.width}
    base |= {"base_depth": model.base_depth or model.depth}
    return ModelSpec.model_validate(model.model_dump() | base | {axis: size})


def _average_over_seeds(setup: CheckSetup, spec: ModelSpec) -> list[Sizes]:
    runs = [measure_activations(setup, spec, seed) for seed in range(setup.num_seeds)]
    log.info("width %d, depth %d: %d seeds done", spec.width, spec.depth, setup.num_seeds)
    steps = zip(*runs, strict=True)
    return [{kind: fmean(seed[kind] for seed in step) for kind in KINDS} for step in steps]


def measure_activations(setup: CheckSetup, spec: ModelSpec, seed: int) -> list[Sizes]:
    """Mean |x| of each kind of layer's output after 0, 1, ..., `num_steps` steps.

    What t steps made of the model is measured on batch t, the first that has not been trained on.
    """
    model = init_weights_(Decoder(spec, context=setup.context), spec, Generator().manual_seed(seed))
    optimizer = build_optimizer(model.to(setup.device).named_parameters(), spec, setup.train)
    read = _hook_activations(model)
    measured: list[Sizes] = []
    for step in range(setup.num_steps + 1):
        batch = read_train_batch(
            setup.tokens,
            seed=seed,
            step=step,
            batch_size=setup.train.batch_size,
            context=setup.context,
        )
        with fused.disable_fused():  # or only the blocks would have outputs
            loss = loss_nats(model, batch.to(setup.device))
        measured.append(_check_finite(read(), spec, step))
        if step < setup.num_steps:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return measured


def _hook_activations(model: Decoder) -> Callable[[], Sizes]:
    """Hook the model; what is returned reads the sizes of the forward pass since the last read."""
    outputs: dict[Kind, list[Tensor]] = {kind: [] for kind in KINDS}

    def collect(module: torch.nn.Module, kind: Kind) -> None:
        def hook(_module: torch.nn.Module, _inputs: object, output: Tensor) -> None:
            outputs[kind].append(output.detach().abs().mean())

        module.register_forward_hook(hook)

    def read() -> Sizes:
        sizes: Sizes = {k: float(torch.stack(found).mean()) for k, found in outputs.items()}
        for found in outputs.values():
            found.clear()
        return sizes

    for name, module in model.named_modules():
        for kind in KINDS:
            if name.rsplit(".", 1)[-1] == kind:
                collect(module, kind)
    collect(model.blocks[-1], "stream")
    return read


def _check_finite(sizes: Sizes, spec: ModelSpec, step: int) -> Sizes:
    for kind, size in sizes.items():
        if not math.isfinite(size):
            raise ValueError(
                f"mean |x| of {kind} is {size} at width {spec.width}, depth {spec.depth} after "
                f"{step} steps; use a lower lr"
            )
    return sizes
