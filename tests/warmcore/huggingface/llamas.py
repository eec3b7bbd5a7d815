"""Models of transformers and checkpoints of ours to compare, without any download."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    Qwen2Config,
)
from transformers.utils import logging

from tests.warmcore.growth.families import seeded
from warmcore.checkpoint.checkpoint import load_checkpoint, save_checkpoint
from warmcore.checkpoint.progress import Progress
from warmcore.model.decoder import Decoder, init_weights_
from warmcore.tensors.files import TensorStream

logging.set_verbosity_error()
logging.disable_progress_bar()

CONTEXT = 16
TOKENS = torch.randint(0, 256, (2, CONTEXT), generator=seeded())
SHAPE = {
    "vocab_size": 256,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
CONFIGS = {"Llama": LlamaConfig, "Mistral": MistralConfig, "Qwen2": Qwen2Config}


def theirs(family="Llama", *, seed=0, **fields):
    """Return a random model; gains and biases too, because their 1 and 0 would hide faults."""
    if family == "Mistral":
        fields = {"sliding_window": None} | fields
    model = AutoModelForCausalLM.from_config(CONFIGS[family](**SHAPE | fields)).eval()
    generator = seeded(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.0 * noise if name.endswith(".bias") else 0.3 * noise)
            if "norm" in name:
                parameter.add_(1.0)
    return model


def loaded(folder, **options):
    return LlamaForCausalLM.from_pretrained(folder, **{"dtype": torch.float32} | options).eval()


@torch.no_grad()
def their_logits(model, tokens=TOKENS):
    return model(tokens).logits


@torch.no_grad()
def our_logits(checkpoint, tokens=TOKENS):
    return decoder_of(checkpoint)(tokens)


def decoder_of(checkpoint):
    saved = load_checkpoint(checkpoint)
    model = Decoder(saved.manifest.model, context=saved.manifest.context)
    model.load_state_dict(saved.weights)
    return model


def random_weights(model):
    """Return initial weights, but with random gains and a random unembedding."""
    generator = seeded()
    drawn = init_weights_(Decoder(model, context=1), model, generator)
    tensors = dict(drawn.state_dict())
    for name, tensor in tensors.items():
        if "norm" in name:
            tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.3)
        if name.startswith("unembedding"):
            tensor.normal_(generator=generator)
    return tensors


def checkpoint_of(run, path, tensors=None):
    return save_checkpoint(
        path,
        weights=TensorStream.from_tensors(tensors or random_weights(run.model)),
        optimizer=TensorStream.from_tensors({}),
        run=run,
        data_hash="x",
        base_hash=None,
        tokens=0,
        progress=Progress(),
    )
