"""The coordinate check (arXiv 2203.03466, appendix D.1): sizes of activations as models grow.

Under muP mean |x| after a few steps does not depend on width: the slope of log mean |x| against
log n is 0 for every kind of layer. Under CompleteP (arXiv 2505.01618) the same holds for depth.
Under standard parametrization both depend on the size.

Under CompleteP the sum of L initial branches falls as 1/sqrt(L), by design. In depth the residual
stream is flat once the learned part outweighs the initial part: after enough steps, or with a small
`init_std`.
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
    """The training of the models of a check: `num_steps` at constant lr, for each seed."""

    tokens: Tokens
    train: TrainSpec
    context: int
    num_steps: int
    num_seeds: int
    device: str = "cpu"


def check_axis(setup: CheckSetup, model: ModelSpec, axis: Axis, sizes: Sequence[int]) -> AxisCheck:
    """Train `model` at each size and average the activations over seeds.

    Raises:
        ValueError: the model cannot have a size, or an activation is not finite.
    """
    # All sizes are valid before the first model is trained: training takes minutes.
    by_size = [
        _average_over_seeds(setup, spec) for spec in [resize_model(model, axis, n) for n in sizes]
    ]
    steps = range(setup.num_steps + 1)
    means: dict[Kind, list[list[float]]] = {
        kind: [[sized[step][kind] for sized in by_size] for step in steps] for kind in KINDS
    }
    return AxisCheck.from_means(axis, sizes, means)


def resize_model(model: ModelSpec, axis: Axis, size: int) -> ModelSpec:
    """Return the model at another size of `axis`, with the same base width and depth."""
    # A missing base width means the model's own width. Write it down before the width changes, or
    # every size would be at its own base, where muP does nothing.
    base = {"base_width": model.base_width or model.width}
    base |= {"base_depth": model.base_depth or model.depth}
    return ModelSpec.model_validate(model.model_dump() | base | {axis: size})


def _average_over_seeds(setup: CheckSetup, spec: ModelSpec) -> list[Sizes]:
    runs = [measure_activations(setup, spec, seed) for seed in range(setup.num_seeds)]
    log.info("width %d, depth %d: %d seeds done", spec.width, spec.depth, setup.num_seeds)
    steps = zip(*runs, strict=True)
    return [{kind: fmean(seed[kind] for seed in step) for kind in KINDS} for step in steps]


def measure_activations(setup: CheckSetup, spec: ModelSpec, seed: int) -> list[Sizes]:
    """Return mean |x| of the output of each kind of layer after 0, 1, ..., `num_steps` steps.

    The model after t steps is measured on batch t, the first batch that it has not seen.
    """
    model = init_weights_(Decoder(spec, context=setup.context), spec, Generator().manual_seed(seed))
    optimizer = build_optimizer(model.to(setup.device).named_parameters(), spec, setup.train)
    read_sizes = _hook_activations(model)
    measured: list[Sizes] = []
    for step in range(setup.num_steps + 1):
        batch = read_train_batch(
            setup.tokens,
            seed=seed,
            step=step,
            batch_size=setup.train.batch_size,
            context=setup.context,
        )
        # The fused functions skip the modules inside a block, and the hooks would see nothing.
        with fused.disable_fused():
            loss = loss_nats(model, batch.to(setup.device))
        measured.append(_check_finite(read_sizes(), spec, step))
        if step < setup.num_steps:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return measured


def _hook_activations(model: Decoder) -> Callable[[], Sizes]:
    """Hook the model; return a function that reads the sizes since its last call."""
    outputs: dict[Kind, list[Tensor]] = {kind: [] for kind in KINDS}

    def add_hook(module: torch.nn.Module, kind: Kind) -> None:
        def note_output(_module: torch.nn.Module, _inputs: object, output: Tensor) -> None:
            outputs[kind].append(output.detach().abs().mean())

        module.register_forward_hook(note_output)

    def read_sizes() -> Sizes:
        sizes: Sizes = {k: float(torch.stack(means).mean()) for k, means in outputs.items()}
        for means in outputs.values():
            means.clear()
        return sizes

    for name, module in model.named_modules():
        for kind in KINDS:
            if name.rsplit(".", 1)[-1] == kind:
                add_hook(module, kind)
    # The residual stream is the output of the last block.
    add_hook(model.blocks[-1], "stream")
    return read_sizes


def _check_finite(sizes: Sizes, spec: ModelSpec, step: int) -> Sizes:
    for kind, size in sizes.items():
        if not math.isfinite(size):
            raise ValueError(
                f"mean |x| of {kind} is {size} at width {spec.width}, depth {spec.depth} after "
                f"{step} steps; use a lower lr"
            )
    return sizes
