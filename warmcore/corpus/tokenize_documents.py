"""Documents of a split -> files of 16-bit or 32-bit tokens, in a folder named by the data hash."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from warmcore.corpus import tokenizer
from warmcore.corpus.documents import Document, Split
from warmcore.corpus.tokenizer import SEPARATOR, TOKENIZER, TextTokenizer
from warmcore.specs.data import DataSpec
from warmcore.specs.sources import BpeTokens, ByteTokens
from warmcore.storage.atomic_writes import write_folder


def write_split(split: Split, spec: DataSpec, cache_dir: Path) -> None:
    """Write the tokens of both sides into the folder of their hash, unless it is there.

    Raises:
        ValueError: a document changed, or the tokens of a side are fewer than a context.
    """
    folder = cache_dir / split.data_hash
    if folder.exists():
        return
    # Preparers of other listings may write the same content at the same time.
    with write_folder(folder, may_lose=True) as aside:
        if isinstance(spec.parsed_tokenizer, ByteTokens):
            _write_tokens(aside / "train.u16", split.train)
            _write_tokens(aside / "val.u16", split.val)
        else:
            _write_tokenized(aside, split, spec)


def _write_tokens(path: Path, documents: Iterable[Document]) -> None:
    """Write bytes as 16-bit tokens, each document followed by the separator."""
    with path.open("wb") as file:
        for document in documents:
            content = np.frombuffer(document.read_bytes() + SEPARATOR, dtype=np.uint8)
            file.write(content.astype("<u2").tobytes())


def _write_tokenized(aside: Path, split: Split, spec: DataSpec) -> None:
    """Train a `bpe:N` tokenizer on the training side, or read the file, and encode both sides."""
    # Validation must not influence the tokenizer: merges learned from it would lower its loss.
    texts = {"train": _read_texts(split.train), "val": _read_texts(split.val)}
    parsed = spec.parsed_tokenizer
    if isinstance(parsed, BpeTokens):
        content = tokenizer.train_bpe(_read_texts(split.train), parsed.vocab_size)
    else:
        content = tokenizer.read_tokenizer_json(spec)
    loaded = TextTokenizer.from_json(content, spec.tokenizer)
    dtype = "u16" if loaded.vocab_size <= 2**16 else "u32"
    for side, of_side in texts.items():
        num_tokens = _write_ids(aside / f"{side}.{dtype}", loaded.encode(of_side))
        if num_tokens <= spec.context:
            raise ValueError(
                f"source {spec.source} has {num_tokens} tokens for {side} with tokenizer "
                f"{spec.tokenizer}; context + 1 = {spec.context + 1} at least; a shorter context, "
                "more text or tokenizer byte would work"
            )
    (aside / TOKENIZER).write_bytes(content)


def _read_texts(documents: Iterable[Document]) -> Iterator[str]:
    return (document.read_text() for document in documents)


def _write_ids(path: Path, documents: Iterable[list[int]]) -> int:
    """Write ids in the width that the suffix names; return their number."""
    num_tokens = 0
    with path.open("wb") as file:
        for ids in documents:
            file.write(np.array(ids, dtype="<u2" if path.suffix == ".u16" else "<u4").tobytes())
            num_tokens += len(ids)
    return num_tokens
