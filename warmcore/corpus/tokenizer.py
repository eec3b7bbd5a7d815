"""Bytes <-> tokens: bytes themselves, byte-level BPE trained on the corpus, or a tokenizer.json.

A token marks the end of every document: byte 0, or the first id of `bpe:N`, or the first of
`END_TOKENS` that the tokenizer.json has. A tokenizer.json without these marks no end. Text that
spells an end token, "<|endoftext|>", stays text. No token marks a beginning.

Functions import the library `tokenizers` themselves: the service must not load it.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from warmcore.specs.data import DataSpec
from warmcore.specs.fields import FieldError
from warmcore.specs.sources import (
    BYTE_VOCAB_SIZE,
    BpeTokens,
    ByteTokens,
    NoTokenizer,
    TokenizerFile,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER = "tokenizer.json"
SEPARATOR = b"\0"  # ends a document of byte tokens
END_OF_TEXT = "<|endoftext|>"
# The spellings of GPT-2 and Qwen, Llama 3, Llama 2 and Mistral, Gemma, BERT.
END_TOKENS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "[SEP]")
# Documents in order of content hash are a fair sample; more text hardly changes the merges.
MAX_TRAINING_BYTES = 256 * 2**20
# The library encodes a batch on all cores; 1 M characters keep the cores busy and the memory small.
_BATCH_CHARACTERS = 2**20


def identify_tokenizer(spec: DataSpec) -> str:
    """Return the tokenizer's part of the data hash: all that tokens depend on besides the text.

    Raises:
        ValueError: the tokenizer.json cannot be read, or its hash is not the pinned hash.
    """
    match spec.parsed_tokenizer:
        case ByteTokens() | NoTokenizer():
            return spec.tokenizer
        case BpeTokens():
            # Another version of the library may learn other merges from the same text.
            return f"{spec.tokenizer} tokenizers {version('tokenizers')}"
        case TokenizerFile():
            return f"tokenizer {hashlib.sha256(read_tokenizer_json(spec)).hexdigest()}"


def read_tokenizer_json(spec: DataSpec) -> bytes:
    """Return the content of the tokenizer.json that `spec` names.

    Raises:
        ValueError: the file cannot be read, or has changed since the submission.
    """
    try:
        content = Path(spec.tokenizer).expanduser().read_bytes()
    except (OSError, RuntimeError) as error:
        raise FieldError(
            "tokenizer",
            spec.tokenizer,
            f"tokenizer {spec.tokenizer} cannot be read: {error}; byte, bpe:N or the path of a "
            "tokenizer.json would work",
        ) from None
    found = hashlib.sha256(content).hexdigest()
    if spec.tokenizer_hash not in (None, found):
        raise FieldError(
            "tokenizer_hash",
            spec.tokenizer_hash,
            f"tokenizer {spec.tokenizer} has changed: its hash is {found}, not "
            f"{spec.tokenizer_hash}; restore it, or submit a new study",
        )
    return content


@dataclass(frozen=True, kw_only=True, eq=False)
class TextTokenizer:
    """A loaded tokenizer.json."""

    json: bytes
    library: "Tokenizer"
    end_of_text: int | None
    vocab_size: int

    @classmethod
    def from_json(cls, content: bytes, name: str) -> "TextTokenizer":
        """Parse the content of a tokenizer.json; `name` is for the error.

        Raises:
            ValueError: the content is no tokenizer.json, or has no tokens.
        """
        from tokenizers import Tokenizer  # noqa: PLC0415

        try:
            library = Tokenizer.from_buffer(content)
        except Exception as error:  # noqa: BLE001 - the library raises Exception itself
            raise FieldError(
                "tokenizer",
                name,
                f"tokenizer {name} is no tokenizer.json ({error}); the file of that name beside a "
                "Hugging Face model would work, or bpe:N, or byte",
            ) from None
        # A file may ask for truncation and padding, for batches of a model. A corpus needs all ids
        # and no others. With `encode_special_tokens`, text that spells an end token stays text.
        library.no_truncation()
        library.no_padding()
        library.encode_special_tokens = True
        ids = library.get_vocab(with_added_tokens=True)
        if not ids:
            message = f"tokenizer {name} has no tokens; bpe:N or byte would work"
            raise FieldError("tokenizer", name, message)
        end = next((ids[token] for token in END_TOKENS if token in ids), None)
        return cls(json=content, library=library, end_of_text=end, vocab_size=max(ids.values()) + 1)

    def encode(self, texts: Iterable[str]) -> Iterator[list[int]]:
        """Yield the tokens of each text, with the end token."""
        end = [] if self.end_of_text is None else [self.end_of_text]
        for batch in _batch_texts(texts):
            for encoding in self.library.encode_batch_fast(batch, add_special_tokens=False):
                yield encoding.ids + end


def _batch_texts(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    num_characters = 0
    for text in texts:
        batch.append(text)
        num_characters += len(text)
        if num_characters >= _BATCH_CHARACTERS:
            yield batch
            batch, num_characters = [], 0
    if batch:
        yield batch


def train_bpe(texts: Iterable[str], vocab_size: int) -> bytes:
    """Train byte-level BPE (arXiv 1909.03341, as GPT-2); return a tokenizer.json.

    The file has at most `vocab_size` ids: id 0 ends a document, the next 256 are the bytes, the
    rest are merges in order of frequency. The same texts give the same file, in any order and on
    any number of threads.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: PLC0415

    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(_sample_texts(texts), trainer)
    return library.to_str().encode()


def _sample_texts(texts: Iterable[str]) -> Iterator[str]:
    num_bytes = 0
    for text in texts:
        yield text
        num_bytes += len(text.encode())
        if num_bytes >= MAX_TRAINING_BYTES:
            return


def make_byte_json() -> bytes:
    """Return a tokenizer.json that maps text to its UTF-8 bytes: id = byte, no special token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: PLC0415

    # Byte 0 is no special token in the file: it may occur in text.
    vocab = {stand_in: byte for byte, stand_in in enumerate(_list_stand_ins())}
    library = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = decoders.ByteLevel()
    return library.to_str().encode()


def _list_stand_ins() -> list[str]:
    """Return the character for each byte in GPT-2's alphabet (`bytes_to_unicode` of GPT-2).

    A visible byte stands for itself: 0x41 is "A". The others get the characters from U+0100 on, in
    order: byte 0 is U+0100, and the space, the 33rd invisible byte, is U+0120 ("Ġ").
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(BYTE_VOCAB_SIZE) if byte not in visible]
    return [
        chr(byte) if byte in visible else chr(0x100 + hidden.index(byte))
        for byte in range(BYTE_VOCAB_SIZE)
    ]
