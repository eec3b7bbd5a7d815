"""A side of `benchmarks/train_throughput.py`: trains on request and reports its speed.

`python side.py ours 64x4 1`: a size is width x depth, the last argument the number of threads.
The program reads `turn`, `parts` or `end` from stdin, and answers each with a line of JSON.
"""

import json
import resource
import sys
import time
from collections.abc import Callable

import torch
from parts import measure_parts
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the usual name
from transformers import LlamaConfig, LlamaForCausalLM  # imported on both sides, for equal memory

from warmcore.model.decoder import Decoder, init_weights_, loss_nats
from warmcore.specs import ModelSpec, TrainSpec
from warmcore.training.optimizer import build_optimizer, clip_gradients_

CONTEXT, BATCH = 128, 16
TURN_SECONDS = 0.5

Step = Callable[[], float]


def main(side: str, size: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    width, depth = map(int, size.split("x"))
    spec = ModelSpec(width=width, depth=depth, head_dim=min(64, width // 4))
    window = torch.randint(0, spec.vocab_size, (BATCH, CONTEXT + 1))
    build = {"ours": make_our_step, "transformers": make_transformers_step}[side]
    # A small step first: it loads libraries that torch loads lazily, before memory is measured.
    build(ModelSpec(width=16, depth=1, head_dim=16), window)()
    # Peak memory counts from here: imports and the small step are equal on both sides.
    before = peak_mb()
    step = build(spec, window)
    for _ in range(3):
        step()
    for line in sys.stdin:
        match line.strip():
            case "turn":
                answer = run_turn(step)
            case "parts":
                answer = measure_parts(step, spec, rows=BATCH * CONTEXT)
            case _:
                answer = {"peak_mb": peak_mb() - before}
        print(json.dumps(answer), flush=True)
        if "peak_mb" in answer:
            return


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run_turn(step: Step) -> dict[str, float]:
    """Train for `TURN_SECONDS` and return tokens per second of wall time and of CPU time."""
    wall, cpu, steps = time.perf_counter(), time.process_time(), 0
    while steps < 2 or time.perf_counter() - wall < TURN_SECONDS:
        step()
        steps += 1
    tokens = steps * BATCH * CONTEXT
    return {
        "wall": tokens / (time.perf_counter() - wall),
        "cpu": tokens / (time.process_time() - cpu),
    }


def make_our_step(spec: ModelSpec, window: Tensor) -> Step:
    """Return a train step as in `warmcore.training.training`."""
    model = init_weights_(Decoder(spec, context=CONTEXT), spec, torch.Generator().manual_seed(0))
    optimizer = build_optimizer(model.named_parameters(), spec, TrainSpec())

    def run_step() -> float:
        optimizer.zero_grad()
        loss = loss_nats(model, window)
        loss.backward()
        clip_gradients_(optimizer, 1.0, 1.0)
        optimizer.step()
        return loss.item()

    return run_step


def make_transformers_step(spec: ModelSpec, window: Tensor) -> Step:
    """Return the same step with LlamaForCausalLM, PyTorch's clipping and AdamW."""
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

    def run_step() -> float:
        optimizer.zero_grad()
        logits = model(input_ids=window[:, :-1]).logits
        loss = F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return run_step


if __name__ == "__main__":
    main(*sys.argv[1:])
