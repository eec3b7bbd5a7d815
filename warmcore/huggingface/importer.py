"""Import of a Hugging Face folder as a checkpoint that can be grown: Llama, and equal functions.

Weights become float32, tied embeddings become two tensors, and the tokenizer's files are copied.
Tensors are read and written singly. Nothing is unpickled: folders of `.bin` files are refused.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from warmcore.checkpoint.checkpoint import SavedCheckpoint, save_checkpoint
from warmcore.checkpoint.manifest import ImportedModel
from warmcore.checkpoint.progress import Progress
from warmcore.huggingface.config import CONFIG, HfConfig
from warmcore.huggingface.export import INDEX, WEIGHTS
from warmcore.huggingface.tensors import EMBEDDING, LM_HEAD, hf_name
from warmcore.huggingface.tokenizer import TOKENIZER_FILES
from warmcore.model.decoder import parameter_shapes
from warmcore.storage.atomic_writes import check_free
from warmcore.storage.file_facts import measure_file
from warmcore.tensors.files import NAMES, TensorFile, TensorInfo, TensorStream, is_finite

_READABLE = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_CONVERT = (
    "transformers converts it: AutoModelForCausalLM.from_pretrained(PATH).save_pretrained(NEW)"
)


@dataclass(frozen=True, kw_only=True)
class _Source:
    """The tensors of all shards by their Hugging Face names; each access reads the disk."""

    files: Mapping[str, TensorFile]

    def read_info(self, name: str) -> TensorInfo:
        return self.files[name].layout[name]

    def __getitem__(self, name: str) -> Tensor:
        return self.files[name][name]


def import_hf(folder: Path, out: Path) -> SavedCheckpoint:
    """Write the checkpoint `out` with the weights of the model in `folder`.

    Raises:
        ValueError: our decoder cannot compute the model, its files are damaged, or `out` exists.
    """
    check_free(out)
    config = HfConfig.read_folder(folder)
    model = config.model
    shards = _list_shards(folder)
    source = _open_shards(shards)
    shapes = {name: tuple(shape) for name, shape in parameter_shapes(model).items()}
    places = {name: _find_source_name(name, config) for name in shapes}
    # Check everything before the first byte is written: a refused model leaves no folder.
    _check_names(source, places, config)
    _check_tensors(source, places, shapes)
    used = {source.read_info(place).dtype for place in places.values()}
    return save_checkpoint(
        out,
        weights=TensorStream(
            layout={n: TensorInfo(dtype=torch.float32, shape=shapes[n]) for n in shapes},
            tensors=_read_master_weights(source, places),
        ),
        optimizer=TensorStream.from_tensors({}),
        run=ImportedModel(
            model=model,
            context=config.max_position_embeddings,
            architecture=config.architecture,
            dtypes=tuple(sorted(_READABLE[dtype] for dtype in used)),
            tied_embeddings=config.tie_word_embeddings,
            bos=config.bos_token_id,
            eos=config.eos_token_id,
            source_files={path.name: measure_file(path) for path in [folder / CONFIG, *shards]},
        ),
        data_hash=None,
        base_hash=None,
        tokens=0,
        progress=Progress(),
        attached={
            name: (folder / name).read_bytes()
            for name in TOKENIZER_FILES
            if (folder / name).is_file()
        },
    )


def _find_source_name(name: str, config: HfConfig) -> str:
    """Return the Hugging Face name of our tensor; tied embeddings share a name."""
    place = hf_name(name)
    return EMBEDDING if config.tie_word_embeddings and place == LM_HEAD else place


def _list_shards(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        names = _read_shard_names(folder / INDEX)
    elif (folder / WEIGHTS).is_file():
        names = [WEIGHTS]
    else:
        raise ValueError(f"{folder} has no {WEIGHTS}{_describe_pickles(folder)}")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"{folder} lacks {len(missing)} of {len(names)} shards, first {missing[0]}"
        )
    return [folder / name for name in names]


def _describe_pickles(folder: Path) -> str:
    found = [path.name for kind in _PICKLES for path in sorted(folder.glob(kind))]
    if not found:
        return ""
    return f", only {found[0]}, a pickle, and reading a pickle can run code; {_CONVERT}"


def _read_shard_names(index: Path) -> list[str]:
    try:
        weight_map: dict[str, Any] = json.loads(index.read_bytes())["weight_map"]
        names = sorted({str(name) for name in weight_map.values()})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{index} is corrupt: it has no weight_map of tensors to files") from error
    # An index is untrusted: the name "../x" would read a file outside the folder.
    outside = [name for name in names if Path(name).name != name]
    if outside or not names:
        raise ValueError(f"{index} is corrupt: {outside or 'nothing'} is no file in its folder")
    return names


def _open_shards(shards: list[Path]) -> _Source:
    files: dict[str, TensorFile] = {}
    for path in shards:
        _check_readable(path)
        file = TensorFile(path)
        repeats = files.keys() & file.keys()
        if repeats:
            raise ValueError(
                f"{path} has {min(repeats)}, and another shard too; one shard is stale"
            )
        files |= dict.fromkeys(file, file)
    return _Source(files=files)


def _check_readable(path: Path) -> None:
    """Raise ValueError if a file is damaged or has a dtype that we do not read."""
    # `safe_open` checks that header and length agree; `TensorFile` does not.
    try:
        with safe_open(path, framework="pt") as file:
            dtypes = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is corrupt or incomplete: {error}") from error
    for name, dtype in dtypes.items():
        if dtype not in NAMES.values():
            raise ValueError(f"{path}: {name} is of dtype {dtype}; F32, BF16 or F16 work")


def _check_names(source: _Source, places: Mapping[str, str], config: HfConfig) -> None:
    """Raise ValueError if a tensor is missing, or if another tensor would have an effect."""
    # Tensors without effect are accepted: biases of zeros, a tied lm_head, and the RoPE frequencies
    # that old versions of transformers saved.
    missing = sorted(set(places.values()) - source.files.keys())
    if missing:
        raise ValueError(
            f"{missing[0]} is missing, and {len(missing) - 1} more of {len(set(places.values()))} "
            f"tensors of {config.architecture} with {config.num_hidden_layers} layers"
        )
    for name in sorted(source.files.keys() - set(places.values())):
        if name.endswith(".bias"):
            _check_zero(source, name)
        elif name != LM_HEAD and not name.endswith(".rotary_emb.inv_freq"):
            raise ValueError(f"{name} is no known tensor of {config.architecture}")


def _check_zero(source: _Source, name: str) -> None:
    largest = source[name].abs().max().item()
    if largest:
        raise ValueError(
            f"{name} has values up to {largest:g}; our models have no biases, so only zeros work"
        )


def _check_tensors(
    source: _Source, places: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    for name, place in places.items():
        info = source.read_info(place)
        if info.shape != shapes[name]:
            raise ValueError(
                f"{place} is {list(info.shape)}; {CONFIG} makes it {list(shapes[name])}"
            )
        if info.dtype not in _READABLE:
            raise ValueError(f"{place} is {info.dtype}; {', '.join(_READABLE.values())} work")


def _read_master_weights(
    source: _Source, places: Mapping[str, str]
) -> Iterator[tuple[str, Tensor]]:
    for name, place in places.items():
        tensor = source[place].float()
        if not is_finite(tensor):
            raise ValueError(f"{place} has weights that are infinite or not a number")
        yield name, tensor
