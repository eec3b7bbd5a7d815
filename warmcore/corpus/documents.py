"""Files of a source -> documents -> split into training and validation.

A document is a text file or a record of a JSONL, Parquet or Arrow file. The split orders distinct
documents by the SHA-256 of their content and gives the first documents to validation. It therefore
depends on content alone: not on paths, not on the order of files, not on repetitions. A large
document is cut at line ends into pieces, and each piece is a document: otherwise a single text file
could not be split.

The module needs the standard library alone, because the service inspects corpora with it.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from io import BufferedReader
from itertools import chain
from pathlib import Path

from warmcore.corpus import records, tokenizer
from warmcore.corpus.sources import SourceFile
from warmcore.specs.data import DataSpec
from warmcore.specs.sources import ByteTokens

# A document above 5 % of the corpus is cut, into pieces of about an eighth of the validation share.
# With val_fraction 0.05, a single file of 8 MB is cut into 160 pieces of 50 kB; about 8 of them are
# for validation.
MAX_DOCUMENT_SHARE = 1 / 20
PIECES_PER_SHARE = 8
MAX_PIECE_BYTES = 2**20
# Pieces end at a line's end within this many bytes, or within another piece size.
LINE_BYTES = 256
# A split must leave enough tokens on both sides, but the tokenizer runs after the split: bpe:N is
# trained on the training side. Tokens of English and of code have 2 to 5 bytes. A side with 8 bytes
# for each token that it needs therefore has enough tokens.
BYTES_PER_TOKEN = 8
# A tokenizer holds several copies of a document in memory, so larger documents are cut. Byte tokens
# need no copies.
MAX_ENCODED_BYTES = 16 * 2**20
CONTINUATION_BYTES = bytes(range(0x80, 0xC0))  # of UTF-8


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """`num_bytes` bytes of `path` from `offset`, with the SHA-256 of these bytes as identity."""

    path: Path
    offset: int
    num_bytes: int
    hash: str

    @property
    def num_tokens(self) -> int:
        """Bytes and the separator."""
        return self.num_bytes + 1

    def read_bytes(self) -> bytes:
        """Read the content again; raise ValueError if it has changed since it was hashed."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            content = file.read(self.num_bytes)
        if hashlib.sha256(content).hexdigest() != self.hash:
            raise ValueError(f"{self.path} changed while the corpus was prepared; prepare it again")
        return content

    def read_text(self) -> str:
        """Read the content again as text; raise ValueError if it is not UTF-8."""
        content = self.read_bytes()
        try:
            return content.decode()
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{self.path} is no UTF-8 at byte {self.offset + error.start}; convert it, "
                "remove it, or set tokenizer byte: that takes any bytes"
            ) from None


@dataclass(frozen=True, kw_only=True)
class Split:
    """Documents of both sides, each side in order of content hash; no document is on both."""

    train: tuple[Document, ...]
    val: tuple[Document, ...]
    tokenizer: str

    @cached_property
    def data_hash(self) -> str:
        """SHA-256 over the tokenizer and the content hashes of both sides, in order."""
        digest = hashlib.sha256(f"split 1 {self.tokenizer}\n".encode())
        for side, documents in (("train", self.train), ("val", self.val)):
            digest.update(f"{side} {len(documents)}\n".encode())
            digest.update("".join(f"{document.hash}\n" for document in documents).encode())
        return digest.hexdigest()


def count_tokens(documents: Iterable[Document]) -> int:
    """Return the number of tokens of all documents together."""
    return sum(document.num_tokens for document in documents)


def split_corpus(files: Iterable[SourceFile], spec: DataSpec, scratch: Path | None = None) -> Split:
    """Hash every document, then split by hash. Records are unpacked into the file `scratch`.

    Raises:
        ValueError: a file cannot be read, or a side has fewer than context + 1 tokens.
    """
    try:
        documents = list(_collect_documents(list(files), spec, scratch))
    except OSError as error:
        raise ValueError(f"source {spec.source} cannot be read: {error}") from error
    identity = tokenizer.identify_tokenizer(spec)
    if isinstance(spec.parsed_tokenizer, ByteTokens):
        return split_documents(documents, spec, identity)
    return split_documents(documents, spec, identity, unit="bytes", per_token=BYTES_PER_TOKEN)


def split_documents(
    documents: Iterable[Document],
    spec: DataSpec,
    identity: str,
    *,
    unit: str = "tokens",
    per_token: int = 1,
) -> Split:
    """Give documents to validation, in order of hash, until it has `val_fraction` of all tokens.

    Args:
        documents: Distinct documents, in any order.
        spec: Context and `val_fraction`.
        identity: The tokenizer, as it enters the data hash.
        unit: Word for the error: the things that `Document.num_tokens` counts.
        per_token: Units that stand for a token, where the tokenizer has not run yet.

    Raises:
        ValueError: a side has fewer than context + 1 tokens.
    """
    # The order by hash is random with respect to content, and the same on every machine.
    documents = sorted(documents, key=lambda document: document.hash)
    size, needed = count_tokens(documents), (spec.context + 1) * per_token
    wanted = max(needed, round(spec.val_fraction * size))
    num_val = 0
    cut = 0
    while cut < len(documents) and num_val < wanted:
        num_val += documents[cut].num_tokens
        cut += 1
    num_train = size - num_val
    if min(num_val, num_train) < needed:
        times = f" x {per_token}" if per_token > 1 else ""
        rule = f"(context + 1){times}" if times else "context + 1"
        raise ValueError(
            f"corpus has {size} {unit} in {len(documents)} distinct documents, "
            f"{num_train} of them for training and {num_val} for validation; "
            f"training and validation each need at least {rule} = {needed}"
        )
    return Split(train=tuple(documents[cut:]), val=tuple(documents[:cut]), tokenizer=identity)


def _collect_documents(
    files: list[SourceFile], spec: DataSpec, scratch: Path | None
) -> Iterable[Document]:
    """Return distinct documents: files and records, the large documents cut into pieces."""
    texts = (_hash_file(file.path) for file in files if file.kind == "text")
    whole = drop_duplicates(chain(texts, _hash_records(files, spec, scratch)))
    # A document above the validation share could not go to validation without exceeding it.
    share = min(MAX_DOCUMENT_SHARE, spec.val_fraction) * sum(d.num_bytes for d in whole)
    are_bytes = isinstance(spec.parsed_tokenizer, ByteTokens)
    if not are_bytes:
        share = min(share, MAX_ENCODED_BYTES)
    size = _choose_piece_size(share, spec)
    return drop_duplicates(
        piece
        for document in whole
        for piece in (
            [document]
            if document.num_bytes <= share
            else _cut_document(document, size, whole_characters=not are_bytes)
        )
    )


def _choose_piece_size(share: float, spec: DataSpec) -> int:
    """Return the bytes of a piece, for documents of more than `share` bytes."""
    per_token = 1 if isinstance(spec.parsed_tokenizer, ByteTokens) else BYTES_PER_TOKEN
    # A side of a single piece is then long enough.
    needed = (spec.context + 1) * per_token
    return min(MAX_PIECE_BYTES, max(round(share / PIECES_PER_SHARE), needed))


def drop_duplicates(documents: Iterable[Document]) -> Iterable[Document]:
    """Keep a single document of each content."""
    return {document.hash: document for document in documents}.values()


def _hash_file(path: Path) -> Document:
    # In chunks: a file may be larger than the memory.
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return Document(path=path, offset=0, num_bytes=file.tell(), hash=digest)


def _hash_records(
    files: list[SourceFile], spec: DataSpec, scratch: Path | None
) -> Iterator[Document]:
    packed = [file for file in files if file.kind == "records"]
    if not packed:
        return
    assert scratch is not None, "records need a scratch file"
    for offset, content in records.unpack_records(packed, spec.text_field, scratch):
        if content:
            digest = hashlib.sha256(content).hexdigest()
            yield Document(path=scratch, offset=offset, num_bytes=len(content), hash=digest)


def _cut_document(document: Document, size: int, *, whole_characters: bool) -> Iterator[Document]:
    """Yield pieces of `size` bytes, each extended to the end of its last line if that is near."""
    path, offset = document.path, document.offset
    end = offset + document.num_bytes
    with path.open("rb") as file:
        file.seek(offset)
        while piece := file.read(min(size, end - offset)):
            # Only a full piece can end inside a line. `readline` stops at its limit, and a text
            # without newlines is then cut anywhere.
            if len(piece) == size:
                piece += file.readline(min(max(size, LINE_BYTES), end - file.tell()))
            if whole_characters:
                piece += _read_rest_of_character(file, end)
            digest = hashlib.sha256(piece).hexdigest()
            yield Document(path=path, offset=offset, num_bytes=len(piece), hash=digest)
            offset += len(piece)


def _read_rest_of_character(file: BufferedReader, end: int) -> bytes:
    """Read the continuation bytes that come next, 3 at most: tokenizers need whole characters."""
    ahead = file.peek(3)[: min(3, end - file.tell())]
    return file.read(len(ahead) - len(ahead.lstrip(CONTINUATION_BYTES)))
