"""Names and factors that turn our tensors into those of `LlamaForCausalLM`.

Our decoder multiplies at four places (`warmcore.model.mup`), Llama only by 1/sqrt(H) in attention.
Each of our multipliers follows or precedes a matrix. It can therefore be folded into the matrix:

=============================  ========================  ====================
ours                           folded into               factor
=============================  ========================  ====================
embedding x alpha_e            embed_tokens              alpha_e
q k^T x alpha_attn / sqrt(H)   q_proj (RoPE is linear)   alpha_attn
branch output x l^-a           o_proj, down_proj         l^-a
logits x alpha_out / m         lm_head                   alpha_out / m
=============================  ========================  ====================
"""

import math

from warmcore.model.mup import multipliers
from warmcore.specs import ModelSpec

LM_HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"
_OUTSIDE = {
    "embedding.weight": EMBEDDING,
    "final_norm.weight": "model.norm.weight",
    "unembedding.weight": LM_HEAD,
}
_IN_BLOCK = {
    "attention_norm": "input_layernorm",
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.o": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn.gate": "mlp.gate_proj",
    "ffn.up": "mlp.up_proj",
    "ffn.down": "mlp.down_proj",
}


def hf_name(name: str) -> str:
    """Return the Hugging Face name of our tensor `name`."""
    # Example: `blocks.3.attention.q.weight` is `model.layers.3.self_attn.q_proj.weight`.
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    _, layer, *inner, weight = name.split(".")
    return f"model.layers.{layer}.{_IN_BLOCK['.'.join(inner)]}.{weight}"


def folded_factor(name: str, model: ModelSpec) -> float:
    """Return the factor that turns our tensor `name` into Llama's."""
    # No rows are reordered: like Llama we rotate halves of a head, not neighbouring features.
    # Example: head_dim 64 and attention_multiplier 2. We multiply q k^T by 2/8 and Llama by 1/8:
    # the factor of q_proj is 2. RoPE is linear, hence the factor may come before the rotation.
    ours = multipliers(model)
    match name.split("."):
        case ["embedding", _]:
            return ours.embedding
        case [*_, "attention", "q", _]:
            return ours.attention * math.sqrt(model.head_dim)
        case [*_, "attention", "o", _] | [*_, "ffn", "down", _]:
            return ours.residual
        case ["unembedding", _]:
            return ours.logits
        case _:
            return 1.0
