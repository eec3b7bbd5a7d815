"""The rule on files: every kept checkpoint is complete, and its files have the recorded hashes."""

import hashlib
from collections.abc import Iterator
from typing import Any

import fsspec
from pydantic import BaseModel, ValidationError
from sqlalchemy import text
from sqlalchemy.orm import Session

from service.operations.invariants.rules import Violation
from warmcore.storage.file_facts import MANIFEST, FileFacts, measure_open_file
from warmcore.storage.locations import local_path

_KEPT = """
SELECT r.study_id, r.id AS run_id, c.id, c.uri, c.hash
FROM warmscale.checkpoints c JOIN warmscale.runs r ON r.id = c.run_id
WHERE NOT c.superseded ORDER BY c.id
"""


class _ListedFiles(BaseModel):
    """The files of a manifest; its other fields do not matter here."""

    files: dict[str, FileFacts]


def find_violations(session: Session) -> Iterator[Violation]:
    """Yield each kept checkpoint that is not complete; reads every byte of every kept file."""
    for row in session.execute(text(_KEPT)).all():
        for fault in find_faults(row.uri, row.hash):
            seen = f"checkpoint {row.id} at {row.uri}: {fault}"
            yield Violation(
                invariant="files-whole", study_id=row.study_id, run_id=row.run_id, seen=seen
            )


# The database has the hash of the manifest alone, and the manifest has size and hash of each file.
# For example a flipped bit in model.safetensors changes its hash, but not the manifest: the file
# differs from its entry. A worker that rewrote both would change the manifest's own hash.
def find_faults(uri: str, expected_hash: str) -> Iterator[str]:
    """Yield the faults of the checkpoint at `uri`; a complete checkpoint has none."""
    try:
        with _open_file(uri, MANIFEST) as file:
            content: bytes = file.read()
    except OSError as error:
        yield f"{MANIFEST}: {error.strerror or error}"
        return
    if hashlib.sha256(content).hexdigest() != expected_hash:
        yield f"{MANIFEST} does not have the hash {expected_hash}"
        return
    try:
        manifest = _ListedFiles.model_validate_json(content)
    except ValidationError as error:
        yield f"{MANIFEST}: {error.errors()[0]['msg']}"
        return
    for name, facts in manifest.files.items():
        if (fault := _find_fault(uri, name, facts)) is not None:
            yield f"{name}: {fault}"


def _find_fault(uri: str, name: str, expected: FileFacts) -> str | None:
    try:
        with _open_file(uri, name) as file:
            found = measure_open_file(file)
    except OSError as error:
        return error.strerror or str(error)
    if found == expected:
        return None
    return (
        f"the file has {found.num_bytes} bytes of hash {found.sha256}, "
        f"its manifest says {expected.num_bytes} bytes of hash {expected.sha256}"
    )


def _open_file(uri: str, name: str) -> Any:
    return fsspec.open(f"{local_path(uri) or uri}/{name}", "rb")
