"""`DataSpec.inspect`: what the service sees of a corpus before it takes a study.

Text for the byte tokenizer is looked at here, with the standard library alone. Everything else
needs libraries and, for a large tokenizer.json, hundreds of megabytes that a process would keep:
that is done in a process of its own, which is gone afterwards.
"""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

from warmcore import corpus, hub, tokenizer
from warmcore.corpus import CorpusFacts
from warmcore.listing import SourceFile, holds_tokens, list_files
from warmcore.spec import DataError, DataSpec

BAD_SPEC = 2
_SECONDS = 300


def inspect(spec: DataSpec) -> CorpusFacts:
    """Facts of the corpus at `spec.source`.

    Raises:
        ValueError: there is nothing to train on, or no tokenizer to read it with.
    """
    if spec.tokenizer == "byte" and not spec.source.startswith(hub.PREFIX):
        files = list_files(spec.source)
        if all(file.kind == "text" for file in files):
            return corpus.inspect(spec, files)
    return _in_a_process(spec)


def _in_a_process(spec: DataSpec) -> CorpusFacts:
    package = str(Path(__file__).parents[1])
    paths = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    try:
        found = subprocess.run(  # noqa: S603 - our own module, and a spec on its input
            [sys.executable, "-P", "-m", __name__],
            input=spec.model_dump_json(),
            env=os.environ | {"PYTHONPATH": paths},
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ValueError(f"looking at source {spec.source} took over {_SECONDS} s") from None
    if found.returncode == 0:
        return CorpusFacts(**json.loads(found.stdout))
    if found.returncode == BAD_SPEC:
        raise DataError(**json.loads(found.stdout))
    raise RuntimeError(f"inspection of {spec.source} failed: {found.stderr.strip()}")


def look(spec: DataSpec) -> CorpusFacts:
    """`inspect`, in this process."""
    files = list_files(spec.source)
    vocab_size, tokenizer_hash = _tokenizer_facts(spec)
    if holds_tokens(files, spec.source):
        facts = _look_at_tokens(spec, files, vocab_size)
    elif spec.tokenizer == "none":
        raise DataError(
            "tokenizer",
            f"source {spec.source} holds text ({files[0].path}), and tokenizer none reads token "
            "files (.npy, .bin); byte, bpe:N or a tokenizer.json would work",
        )
    else:
        facts = corpus.inspect(spec, files)
    return dataclasses.replace(facts, tokenizer_hash=tokenizer_hash, vocab_size=vocab_size)


def _look_at_tokens(spec: DataSpec, files: list[SourceFile], vocab_size: int | None) -> CorpusFacts:
    from warmcore import shards  # noqa: PLC0415 - needs NumPy

    return shards.inspect(spec, files, vocab_size or 0)


def _tokenizer_facts(spec: DataSpec) -> tuple[int | None, str | None]:
    """Ids of the tokenizer and the hash of its file, where it has one."""
    if not spec.tokenizer.endswith(".json"):
        return spec.known_vocab_size, None
    loaded = tokenizer.TextTokenizer.load(tokenizer.read_json(spec), spec.tokenizer)
    if spec.vocab_size not in (None, loaded.vocab_size):
        raise DataError(
            "vocab_size",
            f"vocab_size {spec.vocab_size} is not the {loaded.vocab_size} of tokenizer "
            f"{spec.tokenizer}; leave it out",
        )
    return loaded.vocab_size, hashlib.sha256(loaded.json).hexdigest()


def main() -> int:
    """Read a spec, print its facts."""
    try:
        facts = look(DataSpec.model_validate_json(sys.stdin.read()))
    except ValueError as error:
        field = error.field if isinstance(error, DataError) else "source"
        print(json.dumps({"field": field, "message": str(error)}))  # noqa: T201 - for who started this
        return BAD_SPEC
    print(json.dumps(dataclasses.asdict(facts)))  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
