"""The inspection of a corpus: the service calls `inspect_corpus` before it accepts a study.

Plain text for the byte tokenizer needs the standard library alone and is inspected in this process.
Every other corpus needs libraries and, for a large tokenizer.json, hundreds of megabytes. A process
of its own inspects it, because a long-lived service would not get that memory back.
"""

import dataclasses
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from warmcore.corpus import tokenizer
from warmcore.corpus.facts import CorpusFacts, inspect_documents
from warmcore.corpus.module_process import run_module
from warmcore.corpus.sources import SourceFile, holds_tokens, list_files
from warmcore.specs.data import DataSpec
from warmcore.specs.fields import FieldError
from warmcore.specs.sources import (
    ByteTokens,
    Files,
    NoTokenizer,
    StandardLibrary,
    TokenizerFile,
)

BAD_SPEC = 2
_SECONDS = 300


def inspect_corpus(spec: DataSpec, files: list[SourceFile] | None = None) -> CorpusFacts:
    """Return the facts of the corpus at `spec.source`; `files` is its listing, if known already.

    Raises:
        ValueError: training on the corpus is impossible, or the tokenizer cannot read it. A
            FieldError names the field of `spec` to change.
    """
    plain = isinstance(spec.parsed_source, StandardLibrary | Files)
    if plain and isinstance(spec.parsed_tokenizer, ByteTokens):
        files = list_files(spec.source) if files is None else files
        if all(file.kind == "text" for file in files):
            return inspect_documents(spec, files)
    return _inspect_in_process(spec, files)


def _inspect_in_process(spec: DataSpec, files: list[SourceFile] | None) -> CorpusFacts:
    # The input is two lines of JSON: the spec and the listing. The answer is a JSON object: facts,
    # or with the exit code BAD_SPEC the path, value and message of a FieldError.
    found = run_module(
        __name__,
        text=f"{spec.model_dump_json()}\n{_dump_files(files)}",
        seconds=_SECONDS,
        too_slow=f"the inspection of source {spec.source} took over {_SECONDS} s",
    )
    if found.returncode == 0:
        return CorpusFacts(**json.loads(found.stdout))
    if found.returncode == BAD_SPEC:
        raise FieldError(**json.loads(found.stdout))
    raise RuntimeError(f"inspection of {spec.source} failed: {found.stderr.strip()}")


def _dump_files(files: list[SourceFile] | None) -> str:
    # A listing costs a stat for each file: the child process does not repeat it.
    rows = None if files is None else [(str(f.path), f.num_bytes, f.mtime_ns) for f in files]
    return json.dumps(rows)


def _load_files(text: str) -> list[SourceFile] | None:
    rows: list[tuple[str, int, int]] | None = json.loads(text)
    if rows is None:
        return None
    return [SourceFile(path=Path(path), num_bytes=n, mtime_ns=t) for path, n, t in rows]


def inspect_here(spec: DataSpec, files: list[SourceFile] | None = None) -> CorpusFacts:
    """Return the facts as `inspect_corpus` does, but compute them in this process."""
    files = list_files(spec.source) if files is None else files
    vocab_size, tokenizer_hash = _read_tokenizer_facts(spec)
    if holds_tokens(files, spec.source):
        facts = _inspect_token_files(spec, files, vocab_size)
    elif isinstance(spec.parsed_tokenizer, NoTokenizer):
        raise FieldError(
            "tokenizer",
            spec.tokenizer,
            f"source {spec.source} holds text ({files[0].path}), and tokenizer none reads token "
            "files (.npy, .bin); byte, bpe:N or a tokenizer.json would work",
        )
    else:
        facts = inspect_documents(spec, files)
    return dataclasses.replace(facts, tokenizer_hash=tokenizer_hash, vocab_size=vocab_size)


def _inspect_token_files(
    spec: DataSpec, files: list[SourceFile], vocab_size: int | None
) -> CorpusFacts:
    from warmcore.corpus import token_files  # noqa: PLC0415 - needs NumPy

    return token_files.inspect_token_files(spec, files, vocab_size or 0)


def _read_tokenizer_facts(spec: DataSpec) -> tuple[int | None, str | None]:
    """Return the number of ids and the hash of a tokenizer.json; None for unknown values."""
    if not isinstance(spec.parsed_tokenizer, TokenizerFile):
        return spec.known_vocab_size, None
    loaded = tokenizer.TextTokenizer.from_json(tokenizer.read_tokenizer_json(spec), spec.tokenizer)
    if spec.vocab_size not in (None, loaded.vocab_size):
        raise FieldError(
            "vocab_size",
            spec.vocab_size,
            f"vocab_size {spec.vocab_size} is not the {loaded.vocab_size} of tokenizer "
            f"{spec.tokenizer}; leave it out",
        )
    return loaded.vocab_size, hashlib.sha256(loaded.json).hexdigest()


def main() -> int:
    """Read a spec and its files from standard input; print the corpus's facts or the bad field."""
    spec_json, files_json = sys.stdin.read().split("\n")  # JSON escapes the newlines of strings
    spec = DataSpec.model_validate_json(spec_json)
    try:
        facts = inspect_here(spec, _load_files(files_json))
    except FieldError as error:
        _print_answer({"path": error.path, "value": error.value, "message": str(error)})
        return BAD_SPEC
    except ValueError as error:
        _print_answer({"path": "source", "value": spec.source, "message": str(error)})
        return BAD_SPEC
    _print_answer(dataclasses.asdict(facts))
    return 0


def _print_answer(fields: dict[str, Any]) -> None:
    print(json.dumps(fields))  # noqa: T201 - `_inspect_in_process` reads it


if __name__ == "__main__":
    sys.exit(main())
