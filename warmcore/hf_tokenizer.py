"""The tokenizer files of an exported model: what encodes text as the run's corpus was encoded."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from warmcore.checkpoint import Manifest
from warmcore.data import SEPARATOR
from warmcore.hf_config import TokenIds, as_json
from warmcore.spec import BYTE_VOCAB_SIZE

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
# What a model's folder may say about its tokenizer; carried along as it is.
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


def tokenizer_of(manifest: Manifest, checkpoint: Path) -> HfTokenizer:
    """The tokenizer that a checkpoint's model was trained with."""
    imported = manifest.imported
    if imported is None:
        return _byte(manifest.context)
    names = manifest.files.keys() & set(TOKENIZER_FILES)
    files = {name: (checkpoint / name).read_bytes() for name in sorted(names)}
    return HfTokenizer(files=files, bos=imported.bos, eos=imported.eos)


def _byte(context: int) -> HfTokenizer:
    """No token goes before a text; the separator goes after a document, not after a prompt."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
    }
    files = {TOKENIZER: byte_tokenizer().to_str().encode(), TOKENIZER_CONFIG: as_json(config)}
    return HfTokenizer(files=files, bos=None, eos=SEPARATOR[0])


def byte_tokenizer() -> Tokenizer:
    """Text to its UTF-8 bytes: id = byte. Special tokens would be text of a corpus, so none is."""
    vocab = {stand_in: byte for byte, stand_in in enumerate(_stand_ins())}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = ByteDecoder()
    return tokenizer


def _stand_ins() -> list[str]:
    """The character that stands for each byte in GPT-2's alphabet: itself if it can be seen.

    The others take the characters from U+0100 on, in order (`bytes_to_unicode` of GPT-2).
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(BYTE_VOCAB_SIZE) if byte not in visible]
    return [
        chr(byte) if byte in visible else chr(0x100 + hidden.index(byte))
        for byte in range(BYTE_VOCAB_SIZE)
    ]
