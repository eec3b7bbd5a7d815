"""Training throughput against transformers' LlamaForCausalLM, in the same run.

Same shapes, batch, optimizer (fused AdamW), clipping, threads and precision; the two take turns, a
few steps each, so that both see the same machine. Prints the median of each and of their ratios.

    python benchmarks/train_throughput.py [--threads 1] [--rounds 15]
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from transformers import LlamaConfig, LlamaForCausalLM

from warmcore.model import Decoder, init_, loss_nats
from warmcore.optim import build_optimizer, clip_
from warmcore.spec import ModelSpec, TrainSpec

Step = Callable[[], float]

CONTEXT = 128
BATCH = 16
SIZES = ((32, 2), (64, 4), (256, 4))
STEPS_PER_TURN = 5


def ours(spec: ModelSpec, window: Tensor) -> Step:
    model = init_(Decoder(spec, context=CONTEXT), spec, torch.Generator().manual_seed(0))
    optimizer = build_optimizer(model.named_parameters(), spec, TrainSpec())

    def step() -> float:
        optimizer.zero_grad()
        loss = loss_nats(model, window)
        loss.backward()
        clip_(optimizer, 1.0, 1.0)
        optimizer.step()
        return loss.item()

    return step


def theirs(spec: ModelSpec, window: Tensor) -> Step:
    config = LlamaConfig(
        vocab_size=spec.vocab_size,
        hidden_size=spec.width,
        intermediate_size=spec.ffn_width,
        num_hidden_layers=spec.depth,
        num_attention_heads=spec.num_heads,
        num_key_value_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), fused=True)

    def step() -> float:
        optimizer.zero_grad()
        logits = model(input_ids=window[:, :-1]).logits
        loss = F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return step


def tokens_per_second(step: Step) -> float:
    start = time.perf_counter()
    for _ in range(STEPS_PER_TURN):
        step()
    return STEPS_PER_TURN * BATCH * CONTEXT / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"torch {torch.__version__}, {arguments.threads} thread(s), {BATCH} x {CONTEXT} tokens")
    print("width depth |   ours tok/s  theirs tok/s | ratio (min..max)")
    for width, depth in SIZES:
        spec = ModelSpec(width=width, depth=depth, head_dim=16 if width < 256 else 64)
        window = torch.randint(0, 256, (BATCH, CONTEXT + 1))
        steps = ours(spec, window), theirs(spec, window)
        for step in steps:
            tokens_per_second(step)
        pairs = [tuple(map(tokens_per_second, steps)) for _ in range(arguments.rounds)]
        ratios = [a / b for a, b in pairs]
        a, b = (statistics.median(column) for column in zip(*pairs, strict=True))
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}..{max(ratios):.2f})"
        print(f"{width:5} {depth:5} | {a:12,.0f} {b:13,.0f} | {spread}")


if __name__ == "__main__":
    main()
