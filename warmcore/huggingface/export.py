"""Export of a checkpoint to a folder that `transformers` loads as `LlamaForCausalLM`.

The logits are equal: the muP multipliers are folded into the weights
(`warmcore.huggingface.tensors`). Each tensor is read, folded and written before the next, and no
second model is ever in memory.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from warmcore.checkpoint.checkpoint import OpenCheckpoint, open_checkpoint
from warmcore.huggingface.config import (
    CONFIG,
    Dtype,
    encode_json,
    make_generation_config,
    make_llama_config,
)
from warmcore.huggingface.tensors import folded_factor, hf_name
from warmcore.huggingface.tokenizer import load_hf_tokenizer
from warmcore.model.decoder import parameter_shapes
from warmcore.specs import BaseWeights, ModelSpec
from warmcore.storage.atomic_writes import check_free, write_folder
from warmcore.tensors.files import TensorFile, TensorInfo, TensorStream, is_finite, write_tensors

DTYPES: dict[Dtype, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
MAX_SHARD_BYTES = 5_000_000_000
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# transformers 4 refuses a file without the framework of its tensors.
_METADATA = {"format": "pt"}


@dataclass(frozen=True, kw_only=True)
class Exported:
    """The written files, and the hash of the exported checkpoint."""

    path: Path
    checkpoint_hash: str
    files: tuple[str, ...]
    num_bytes: int


def export_hf(
    checkpoint: Path,
    out: Path,
    *,
    weights: BaseWeights = "raw",
    dtype: Dtype = "float32",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    expected_hash: str | None = None,
) -> Exported:
    """Write the folder `out`: weights, configuration and tokenizer.

    Raises:
        ValueError: `out` exists already, the checkpoint does not have `weights`, or a weight is
            beyond the range of `dtype`.
        CheckpointCorruptError: a file differs from its hash.
    """
    check_free(out)
    # Hash the checkpoint before writing: a damaged checkpoint leaves no folder.
    source = open_checkpoint(checkpoint, expected_hash=expected_hash)
    with write_folder(out) as aside:
        _write_weights(source, weights, aside, DTYPES[dtype], max_shard_bytes)
        for name, content in _make_text_files(source, checkpoint, dtype).items():
            (aside / name).write_bytes(content)
    files = sorted(out.iterdir())
    return Exported(
        path=out,
        checkpoint_hash=source.hash,
        files=tuple(file.name for file in files),
        num_bytes=sum(file.stat().st_size for file in files),
    )


def _make_text_files(source: OpenCheckpoint, checkpoint: Path, dtype: Dtype) -> Mapping[str, bytes]:
    manifest = source.manifest
    tokenizer = load_hf_tokenizer(manifest, checkpoint)
    config = make_llama_config(
        manifest.model,
        context=manifest.context,
        dtype=dtype,
        bos=tokenizer.bos,
        eos=tokenizer.eos,
    )
    generation = make_generation_config(bos=tokenizer.bos, eos=tokenizer.eos)
    return {
        **tokenizer.files,
        CONFIG: encode_json(config),
        "generation_config.json": encode_json(generation),
    }


def _write_weights(
    source: OpenCheckpoint,
    name_of_weights: BaseWeights,
    folder: Path,
    dtype: torch.dtype,
    max_shard_bytes: int,
) -> None:
    weights = source.select_weights(name_of_weights)
    shapes = parameter_shapes(source.manifest.model)
    infos = {name: TensorInfo(dtype=dtype, shape=tuple(s)) for name, s in shapes.items()}
    shards = list(_split_into_shards(infos, max_shard_bytes))
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if shards[1:] else WEIGHTS
        stream = TensorStream(
            layout={hf_name(name): infos[name] for name in names},
            tensors=_fold_weights(weights, source.manifest.model, names, dtype),
        )
        write_tensors(folder / file, stream, metadata=_METADATA)
        weight_map |= dict.fromkeys(stream.layout, file)
    if shards[1:]:
        total = sum(info.num_bytes for info in infos.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_bytes(encode_json(index))


def _split_into_shards(infos: Mapping[str, TensorInfo], max_bytes: int) -> Iterator[list[str]]:
    """Yield the names of each file: in order, at most `max_bytes`, without splitting a tensor."""
    # A single tensor may exceed the limit. Example: sizes 3, 4, 9 and 1 at limit 8 give the files
    # [3, 4], [9] and [1].
    shard, num_bytes = list[str](), 0
    for name, info in infos.items():
        if shard and num_bytes + info.num_bytes > max_bytes:
            yield shard
            shard, num_bytes = [], 0
        shard.append(name)
        num_bytes += info.num_bytes
    yield shard


def _fold_weights(
    weights: TensorFile, model: ModelSpec, names: list[str], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    for name in names:
        tensor = weights[name]
        # Multiply in float32 and round once; rounding before too would add a second error.
        folded = tensor.mul_(folded_factor(name, model)).to(dtype)
        if not is_finite(folded):
            raise ValueError(
                f"{name} has weights up to {tensor.abs().max():g}, beyond {dtype}; "
                "dtype bfloat16 or float32 works, if they are finite"
            )
        yield hf_name(name), folded
