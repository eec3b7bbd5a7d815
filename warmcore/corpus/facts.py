"""Facts about a corpus that the service stores with a study: sizes, token counts and hashes."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from warmcore.corpus import records
from warmcore.corpus.documents import count_tokens, split_corpus
from warmcore.corpus.sources import SourceFile
from warmcore.specs.data import DataSpec
from warmcore.specs.sources import ByteTokens

# Larger corpora are measured by their file sizes and not read: a request must not hash gigabytes.
MAX_INSPECTED_BYTES = 64 * 2**20


@dataclass(frozen=True, kw_only=True)
class CorpusFacts:
    """Results of an inspection.

    Token counts are None if the tokenizer would have to run. The counts and the hash are None for a
    corpus that is too large to be read in a request. `tokenizer_hash` and `vocab_size` are of a
    tokenizer.json.
    """

    num_documents: int
    num_bytes: int
    num_train_tokens: int | None = None
    num_val_tokens: int | None = None
    data_hash: str | None = None
    tokenizer_hash: str | None = None
    vocab_size: int | None = None

    def pin_spec(self, spec: DataSpec) -> DataSpec:
        """Return the inspected `spec` with the hashes of its corpus and its tokenizer."""
        pins: dict[str, object] = {"hash": self.data_hash or spec.hash}
        if self.tokenizer_hash is not None:
            pins |= {"tokenizer_hash": self.tokenizer_hash, "vocab_size": self.vocab_size}
        return spec.model_copy(update=pins)


def inspect_documents(spec: DataSpec, files: list[SourceFile]) -> CorpusFacts:
    """Return the facts of the text in `files`; raise ValueError if training on it is impossible."""
    num_bytes = sum(file.num_bytes for file in files)
    if num_bytes > MAX_INSPECTED_BYTES:
        _check_first_record(files, spec)
        return CorpusFacts(num_documents=len(files), num_bytes=num_bytes)
    are_bytes = isinstance(spec.parsed_tokenizer, ByteTokens)
    with TemporaryDirectory(prefix="warmscale-") as folder:
        split = split_corpus(files, spec, Path(folder) / "records")
        documents = (*split.train, *split.val)
        # A tokenizer fails on text that is not UTF-8: report the file and the byte now.
        if not are_bytes:
            for document in documents:
                document.read_text()
    return CorpusFacts(
        num_documents=len(documents),
        num_bytes=num_bytes,
        num_train_tokens=count_tokens(split.train) if are_bytes else None,
        num_val_tokens=count_tokens(split.val) if are_bytes else None,
        data_hash=split.data_hash,
    )


def _check_first_record(files: Iterable[SourceFile], spec: DataSpec) -> None:
    """Raise ValueError if the first record lacks the field: the spec probably has a wrong name."""
    first = next((file for file in files if file.kind == "records"), None)
    if first is not None:
        next(records.read_texts(first, spec.text_field), None)
