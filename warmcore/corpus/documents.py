"""Source -> documents -> train/validation split; standard library only, so the service can look.

A document is a text file or a record of a JSONL, Parquet or Arrow file. The split orders distinct
documents by the SHA-256 of their content and gives the first of them to validation, so it depends
on content alone: not on paths, listing order or how often a document occurs. A document too large
to be moved as a whole is cut at line ends into pieces, which are then documents of their own; a
lone text file has a split that way.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from io import BufferedReader
from itertools import chain
from pathlib import Path

from warmcore.corpus import records, tokenizer
from warmcore.corpus.source_files import SourceFile
from warmcore.specs.data import DataSpec
from warmcore.specs.sources import ByteTokens

# A document above this share of the corpus is cut, and a validation share has about 8 pieces.
MAX_DOCUMENT_SHARE = 1 / 20
PIECES_PER_SHARE = 8
MAX_PIECE_BYTES = 2**20
# Pieces end at a line's end within this many bytes, or within another piece size.
LINE_BYTES = 256
# A tokenizer makes fewer tokens than bytes, and how many is known only when it has run (bpe:N is
# even trained on one side of the split). Of English and of code it makes 2 to 5 bytes a token, so
# with this many bytes for each a side has the tokens that it needs.
BYTES_PER_TOKEN = 8
# A tokenizer holds a document in memory several times; a larger one is cut. Bytes are not.
MAX_ENCODED_BYTES = 16 * 2**20
CONTINUATION_BYTES = bytes(range(0x80, 0xC0))  # of UTF-8


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """`num_bytes` bytes of `path` from `offset`, known by the hash of their content."""

    path: Path
    offset: int
    num_bytes: int
    hash: str

    @property
    def num_tokens(self) -> int:
        """Bytes and the separator."""
        return self.num_bytes + 1

    def read_bytes(self) -> bytes:
        """Read the content again; ValueError when it is no longer what was hashed."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            content = file.read(self.num_bytes)
        if hashlib.sha256(content).hexdigest() != self.hash:
            raise ValueError(f"{self.path} changed while the corpus was prepared; prepare it again")
        return content

    def read_text(self) -> str:
        """Read the content again as text; ValueError where it is none."""
        content = self.read_bytes()
        try:
            return content.decode()
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{self.path} is no UTF-8 at byte {self.offset + error.start}; convert or remove "
                "it, or tokenizer byte, which takes any bytes, would work"
            ) from None


@dataclass(frozen=True, kw_only=True)
class Split:
    """Documents of both sides, each in order of content hash; none is in both."""

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
    """Tokens of documents laid end to end."""
    return sum(document.num_tokens for document in documents)


def split_corpus(files: Iterable[SourceFile], spec: DataSpec, scratch: Path | None = None) -> Split:
    """Hash every document, then split by hash. Records are unpacked into the file `scratch`.

    Raises:
        ValueError: unreadable files, or a side with less than one context and its next token.
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
    """Give documents to validation, in order of hash, until it has its share.

    Raises:
        ValueError: a side has less than one context and its next token.
    """
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
    """Distinct documents: files, records, and the pieces of those that are more than a share."""
    texts = (_hash_file(file.path) for file in files if file.kind == "text")
    whole = drop_duplicates(chain(texts, _hash_records(files, spec, scratch)))
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
    """Bytes of a piece of what is larger than `share` bytes."""
    per_token = 1 if isinstance(spec.parsed_tokenizer, ByteTokens) else BYTES_PER_TOKEN
    needed = (spec.context + 1) * per_token
    return min(MAX_PIECE_BYTES, max(round(share / PIECES_PER_SHARE), needed))


def drop_duplicates(documents: Iterable[Document]) -> Iterable[Document]:
    """One document of each content."""
    return {document.hash: document for document in documents}.values()


def _hash_file(path: Path) -> Document:
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
    """Cut after at least `size` bytes, at a line's end where there is one soon enough."""
    path, offset = document.path, document.offset
    end = offset + document.num_bytes
    with path.open("rb") as file:
        file.seek(offset)
        while piece := file.read(min(size, end - offset)):
            if len(piece) == size:
                piece += file.readline(min(max(size, LINE_BYTES), end - file.tell()))
            if whole_characters:
                piece += _read_rest_of_character(file, end)
            digest = hashlib.sha256(piece).hexdigest()
            yield Document(path=path, offset=offset, num_bytes=len(piece), hash=digest)
            offset += len(piece)


def _read_rest_of_character(file: BufferedReader, end: int) -> bytes:
    """The continuation bytes that come next, 3 at most: tokenizers take whole characters."""
    ahead = file.peek(3)[: min(3, end - file.tell())]
    return file.read(len(ahead) - len(ahead.lstrip(CONTINUATION_BYTES)))
