"""Conversion between Hugging Face's `config.json` and our `ModelSpec` (torch-free). METHOD §1.

Our decoder at m = l = 1 is `LlamaForCausalLM`. Mistral without a sliding window, and Qwen2 without
biases, are the same function under other names. A field that would make another function is refused
by name. The values for missing fields are those of transformers 5.23, from
`configuration_{llama,mistral,qwen2}.py` and `modeling_rope_utils.py`.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from warmcore.specs import ModelSpec, Positive, PositiveInt
from warmcore.specs.fields import TokenIds

CONFIG = "config.json"
Dtype = Literal["float32", "bfloat16", "float16"]

# The number of key/value heads if the config has none; None: as many as query heads.
_KV_HEADS: dict[str, int | None] = {
    "LlamaForCausalLM": None,
    "MistralForCausalLM": 8,
    "Qwen2ForCausalLM": 32,
}
_DEFAULT_WINDOW = 4096
_DEFAULT_ROPE_THETA = 10_000.0


class HfConfig(BaseModel):
    """The fields of a `config.json` that decide the function; all other fields are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    architectures: Annotated[tuple[str, ...], Field(min_length=1)]
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    vocab_size: PositiveInt
    max_position_embeddings: PositiveInt
    num_key_value_heads: PositiveInt | None = None
    head_dim: PositiveInt | None = None
    hidden_act: str = "silu"
    rms_norm_eps: Positive = 1e-6
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    rope_theta: Positive | None = None
    rope_parameters: dict[str, Any] | None = None
    rope_scaling: dict[str, Any] | None = None
    partial_rotary_factor: float | None = None
    sliding_window: PositiveInt | None = _DEFAULT_WINDOW
    use_sliding_window: bool = False
    quantization_config: dict[str, Any] | None = None
    auto_map: dict[str, Any] | None = None
    bos_token_id: TokenIds = None
    eos_token_id: TokenIds = None

    @classmethod
    def read_folder(cls, folder: Path) -> "HfConfig":
        """Return the config in a model's folder.

        Raises:
            ValueError: a field is missing, malformed or of another architecture.
        """
        try:
            config = cls.model_validate_json((folder / CONFIG).read_bytes())
        except OSError as error:
            raise ValueError(
                f"{folder / CONFIG} cannot be read ({error.strerror}); give the folder that "
                "`save_pretrained` wrote or that was downloaded from the hub"
            ) from error
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"])) or CONFIG
            raise ValueError(f"{CONFIG}: {field} = {first['input']!r}: {first['msg']}") from error
        config.check_supported()
        return config

    @property
    def architecture(self) -> str:
        """The name of the model's class in transformers."""
        return self.architectures[0]

    @property
    def num_kv_heads(self) -> int:
        """The number of key/value heads."""
        # An explicit null means as many as query heads, and not the default of the architecture.
        given = "num_key_value_heads" in self.model_fields_set
        value = self.num_key_value_heads if given else _KV_HEADS[self.architecture]
        return value or self.num_attention_heads

    @property
    def model(self) -> ModelSpec:
        """The same model as a `ModelSpec` at its own base: every muP factor is 1."""
        # A config with initializer_range 0 says nothing about initial weights: keep our defaults.
        std = self.initializer_range
        stds = ("init_std", "embedding_std", "unembedding_std")
        known_stds = dict.fromkeys(stds, std) if std > 0 else {}
        head_dim = self.hidden_size // self.num_attention_heads
        try:
            return ModelSpec.model_validate(
                {
                    "width": self.hidden_size,
                    "depth": self.num_hidden_layers,
                    "head_dim": head_dim,
                    "group_size": self.num_attention_heads // self.num_kv_heads,
                    "ffn_ratio": self.intermediate_size / self.hidden_size,
                    "vocab_size": self.vocab_size,
                    "base_width": self.hidden_size,
                    "base_depth": self.num_hidden_layers,
                    "rope_theta": self._rope_theta,
                    "norm_eps": self.rms_norm_eps,
                }
                | known_stds
            )
        except ValidationError as error:
            first = error.errors()[0]
            message = first["msg"].removeprefix("Value error, ")
            raise ValueError(
                f"{CONFIG} describes a model that ours cannot be: {message}"
            ) from error

    def check_supported(self) -> None:
        """Raise ValueError if a field makes a function that our decoder cannot compute."""
        if len(self.architectures) != 1 or self.architecture not in _KV_HEADS:
            _refuse_field("architectures", list(self.architectures), f"{', '.join(_KV_HEADS)} work")
        if self.quantization_config is not None:
            method = self.quantization_config.get("quant_method", "set")
            _refuse_field(
                "quantization_config", method, "float32, bfloat16 or float16 weights work"
            )
        # `auto_map` names Python code in the model's folder, and we run no code from there.
        if self.auto_map is not None:
            _refuse_field(
                "auto_map", self.auto_map, "only the code of transformers itself is known here"
            )
        if self.hidden_act != "silu":
            _refuse_field("hidden_act", self.hidden_act, "silu works")
        self._check_heads()
        self._check_rope()
        self._check_window()

    def _check_heads(self) -> None:
        heads, width = self.num_attention_heads, self.hidden_size
        if width % heads:
            _refuse_field("num_attention_heads", heads, f"a divisor of hidden_size {width} works")
        if self.head_dim is not None and self.head_dim * heads != width:
            works = f"hidden_size {width} / num_attention_heads {heads} = {width // heads} works"
            _refuse_field("head_dim", self.head_dim, works)
        if heads % self.num_kv_heads:
            works = f"a divisor of num_attention_heads {heads} works"
            _refuse_field("num_key_value_heads", self.num_kv_heads, works)

    @property
    def _rope(self) -> Mapping[str, Any]:
        return self.rope_scaling or self.rope_parameters or {}

    @property
    def _rope_theta(self) -> float:
        return float(self._rope.get("rope_theta") or self.rope_theta or _DEFAULT_ROPE_THETA)

    def _check_rope(self) -> None:
        # transformers 5 writes `rope_parameters`, 4 `rope_scaling` and `rope_theta` beside it.
        # Example: Llama 3.1 has rope_type llama3, with other angles than ours: refused.
        rope, field = self._rope, "rope_scaling" if self.rope_scaling else "rope_parameters"
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default" or any(isinstance(value, dict) for value in rope.values()):
            _refuse_field(field, dict(rope), "rope_type default, the same in all layers, works")
        if self.rope_theta not in (None, self._rope_theta):
            works = f"it works if it is rope_theta {self.rope_theta}, or is left out"
            _refuse_field(f"{field}.rope_theta", self._rope_theta, works)
        partial = rope.get("partial_rotary_factor", self.partial_rotary_factor)
        if partial not in (None, 1.0):
            _refuse_field("partial_rotary_factor", partial, "1 works: every pair of a head rotates")

    def _check_window(self) -> None:
        """Refuse a sliding window that is shorter than the context."""
        # A window as long as the context masks nothing, and Llama has no window. Qwen2 configs
        # name a window but use it only with use_sliding_window.
        can_slide = self.architecture == "MistralForCausalLM" or (
            self.architecture == "Qwen2ForCausalLM" and self.use_sliding_window
        )
        window, context = self.sliding_window, self.max_position_embeddings
        if can_slide and window is not None and window < context:
            _refuse_field(
                "sliding_window",
                window,
                f"null works, or max_position_embeddings {window} in place of {context}: "
                "shorter sequences never reach the window",
            )


def _refuse_field(field: str, value: object, works: str) -> NoReturn:
    raise ValueError(f"{CONFIG}: {field} is {value!r}; {works}")


def make_llama_config(
    model: ModelSpec, *, context: int, dtype: Dtype, bos: TokenIds, eos: TokenIds
) -> dict[str, Any]:
    """Return the `config.json` of a model after its multipliers are folded into its weights."""
    # transformers 5 reads `rope_parameters` and `dtype`, 4 reads `rope_theta` and `torch_dtype`.
    # Without bos and eos, transformers would take tokens 1 and 2.
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": model.vocab_size,
        "hidden_size": model.width,
        "intermediate_size": model.ffn_width,
        "num_hidden_layers": model.depth,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": context,
        "initializer_range": min(model.init_std, 1.0),
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "pad_token_id": None,
        "use_cache": True,
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def make_generation_config(*, bos: TokenIds, eos: TokenIds) -> dict[str, Any]:
    """Return the `generation_config.json`: greedy by default, to the end of a document."""
    return {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": None, "do_sample": False}


def encode_json(fields: Mapping[str, Any]) -> bytes:
    """Return a JSON file with a field per line."""
    return (json.dumps(fields, indent=2) + "\n").encode()
