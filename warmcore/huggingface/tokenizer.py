"""The tokenizer files of an exported model; they encode text like the run's corpus."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from warmcore.checkpoint.manifest import CheckpointManifest
from warmcore.corpus.tokenizer import SEPARATOR, TOKENIZER, TextTokenizer, make_byte_json
from warmcore.huggingface.config import encode_json
from warmcore.specs.fields import TokenIds

TOKENIZER_CONFIG = "tokenizer_config.json"
# The files about a tokenizer in a model's folder; an import copies them unchanged.
TOKENIZER_FILES = (
    TOKENIZER,
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)


@dataclass(frozen=True, kw_only=True)
class HfTokenizer:
    """Files for `AutoTokenizer`, and the tokens that begin and end a document."""

    files: Mapping[str, bytes]
    bos: TokenIds
    eos: TokenIds


def load_hf_tokenizer(manifest: CheckpointManifest, checkpoint: Path) -> HfTokenizer:
    """Return the tokenizer of a checkpoint's model; without files if it is unknown."""
    # An imported model keeps the files with which it came.
    names = manifest.files.keys() & set(TOKENIZER_FILES)
    files = {name: (checkpoint / name).read_bytes() for name in sorted(names)}
    if manifest.imported is not None:
        return HfTokenizer(files=files, bos=manifest.imported.bos, eos=manifest.imported.eos)
    if manifest.tokenizer == "byte":
        return _make_hf_tokenizer(make_byte_json(), SEPARATOR[0], None, manifest.context)
    if TOKENIZER not in files:
        return HfTokenizer(files={}, bos=None, eos=None)
    loaded = TextTokenizer.from_json(files[TOKENIZER], TOKENIZER)
    name = None if loaded.end_of_text is None else loaded.library.id_to_token(loaded.end_of_text)
    return _make_hf_tokenizer(loaded.json, loaded.end_of_text, name, manifest.context)


def _make_hf_tokenizer(
    content: bytes, eos: int | None, eos_name: str | None, context: int
) -> HfTokenizer:
    """Return the files of a tokenizer of ours: a JSON file and its configuration."""
    # No bos: our corpora put no token before a text. eos is the separator after a document. The
    # tokenizer adds neither, because a prompt is not a whole document.
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
    } | ({} if eos_name is None else {"eos_token": eos_name})
    return HfTokenizer(
        files={TOKENIZER: content, TOKENIZER_CONFIG: encode_json(config)}, bos=None, eos=eos
    )
