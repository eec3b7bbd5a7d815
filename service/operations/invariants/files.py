"""Checkpoints that are kept: their files are there, and are what their hashes say."""

import hashlib
from collections.abc import Iterator
from typing import Any

import fsspec
from pydantic import BaseModel, ValidationError
from sqlalchemy import text
from sqlalchemy.orm import Session

from service.operations.invariants.rules import Violation
from warmcore.storage.file_facts import MANIFEST, FileFacts, facts_of
from warmcore.storage.locations import local_path

_KEPT = """
SELECT r.study_id, r.id AS run_id, c.id, c.uri, c.hash
FROM warmscale.checkpoints c JOIN warmscale.runs r ON r.id = c.run_id
WHERE NOT c.superseded ORDER BY c.id
"""


class _ListedFiles(BaseModel):
    """As much of a manifest as names its files."""

    files: dict[str, FileFacts]


def find_violations(session: Session) -> Iterator[Violation]:
    """Each kept checkpoint that is not complete; reads every byte of every one."""
    for row in session.execute(text(_KEPT)).all():
        for fault in find_faults(row.uri, row.hash):
            seen = f"checkpoint {row.id} at {row.uri}: {fault}"
            yield Violation(
                invariant="files-whole", study_id=row.study_id, run_id=row.run_id, seen=seen
            )


def find_faults(uri: str, expected_hash: str) -> Iterator[str]:
    """What is wrong with the checkpoint at `uri`; nothing where it is whole."""
    try:
        with _open(uri, MANIFEST) as file:
            content: bytes = file.read()
    except OSError as error:
        yield f"{MANIFEST}: {error.strerror or error}"
        return
    if hashlib.sha256(content).hexdigest() != expected_hash:
        yield f"{MANIFEST} is not that of hash {expected_hash}"
        return
    try:
        manifest = _ListedFiles.model_validate_json(content)
    except ValidationError as error:
        yield f"{MANIFEST}: {error.errors()[0]['msg']}"
        return
    for name, facts in manifest.files.items():
        if (fault := _fault(uri, name, facts)) is not None:
            yield f"{name}: {fault}"


def _fault(uri: str, name: str, expected: FileFacts) -> str | None:
    try:
        with _open(uri, name) as file:
            found = facts_of(file)
    except OSError as error:
        return error.strerror or str(error)
    return None if found == expected else f"{found.num_bytes} bytes of hash {found.sha256}"


def _open(uri: str, name: str) -> Any:
    return fsspec.open(f"{local_path(uri) or uri}/{name}", "rb")
