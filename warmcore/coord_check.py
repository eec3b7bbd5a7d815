"""Coordinate check (arXiv 2203.03466, appendix D.1): do activations stay in place as models grow?

Under muP mean |x| after a few steps does not depend on width, so that the slope of log mean |x|
against log n is 0 for every kind of layer; under CompleteP (arXiv 2505.01618) the same holds of
depth. Under standard parametrization neither does.
"""

from collections.abc import Mapping, Sequence
from statistics import linear_regression

import torch
from torch import Generator, Tensor, nn

from warmcore.batches import train_batch
from warmcore.data import Tokens
from warmcore.model import Decoder, init_, loss_nats
from warmcore.optim import build_optimizer
from warmcore.spec import ModelSpec, TrainSpec

# The stream is what the last block puts out. Not the final norm: it carries the logit multiplier.
KINDS = ("embedding", "attention", "ffn", "stream", "unembedding")


def slopes(
    model: ModelSpec,
    widths: Sequence[int],
    tokens: Tokens,
    *,
    train: TrainSpec,
    context: int,
    num_steps: int,
    seeds: Sequence[int] = (0,),
) -> dict[str, float]:
    """Slope of log mean |x| against log n by kind of layer, after `num_steps` at constant lr."""
    models = {width: model.model_copy(update={"width": width}) for width in widths}
    return _slopes(models, tokens, train=train, context=context, num_steps=num_steps, seeds=seeds)


def depth_slopes(
    model: ModelSpec,
    depths: Sequence[int],
    tokens: Tokens,
    *,
    train: TrainSpec,
    context: int,
    num_steps: int,
    seeds: Sequence[int] = (0,),
) -> dict[str, float]:
    """Slope of log mean |x| against log L by kind of layer, after `num_steps` at constant lr."""
    models = {depth: model.model_copy(update={"depth": depth}) for depth in depths}
    return _slopes(models, tokens, train=train, context=context, num_steps=num_steps, seeds=seeds)


def _slopes(
    models: Mapping[int, ModelSpec],
    tokens: Tokens,
    *,
    train: TrainSpec,
    context: int,
    num_steps: int,
    seeds: Sequence[int],
) -> dict[str, float]:
    sizes: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for spec in models.values():
        runs = [
            activation_sizes(
                spec, tokens, train=train, context=context, num_steps=num_steps, seed=seed
            )
            for seed in seeds
        ]
        for kind in KINDS:
            sizes[kind].append(sum(run[kind] for run in runs) / len(runs))
    log_sizes = torch.tensor(list(models)).log().tolist()
    return {
        kind: linear_regression(log_sizes, torch.tensor(sizes[kind]).log().tolist()).slope
        for kind in KINDS
    }


def activation_sizes(
    spec: ModelSpec,
    tokens: Tokens,
    *,
    train: TrainSpec,
    context: int,
    num_steps: int,
    seed: int,
) -> dict[str, float]:
    """Mean |x| of each kind of layer's output, on the batch after `num_steps` steps."""
    model = init_(Decoder(spec, context=context), spec, Generator().manual_seed(seed))
    optimizer = build_optimizer(model.named_parameters(), spec, train)
    for step in range(num_steps):
        optimizer.zero_grad()
        loss_nats(model, _batch(tokens, train, context, seed, step)).backward()
        optimizer.step()
    outputs: dict[str, list[Tensor]] = {kind: [] for kind in KINDS}
    for name, module in model.named_modules():
        if (kind := name.rsplit(".", 1)[-1]) in outputs:
            _collect(module, outputs[kind])
    _collect(model.blocks[-1], outputs["stream"])
    with torch.no_grad():
        loss_nats(model, _batch(tokens, train, context, seed, num_steps))
    return {kind: torch.stack(means).mean().item() for kind, means in outputs.items()}


def _collect(module: nn.Module, means: list[Tensor]) -> None:
    def hook(_module: nn.Module, _inputs: object, output: Tensor) -> None:
        means.append(output.abs().mean())

    module.register_forward_hook(hook)


def _batch(tokens: Tokens, train: TrainSpec, context: int, seed: int, step: int) -> Tensor:
    return train_batch(tokens, seed=seed, step=step, batch_size=train.batch_size, context=context)
