"""The backup's one file: a zip of tables as COPY writes them, and a manifest of all their hashes.

The manifest is the last to be written: a file that is cut short has none. The zip checks the
manifest by its CRC, the manifest each table by its SHA-256.
"""

import hashlib
import zipfile
import zlib
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from warmcore.storage.atomic_writes import ONLY_THIS_USER, write_file

MANIFEST = "backup.json"
_CHUNK_BYTES = 1 << 20


class BackupError(Exception):
    """A backup cannot be written here, or is not one, or is damaged."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class BackupTable(_Frozen):
    """One table's rows: COPY text of these columns, a line a row."""

    schema_name: str
    name: str
    columns: tuple[str, ...]
    num_rows: int
    num_bytes: int
    sha256: str

    @property
    def member(self) -> str:
        """Its name in the zip."""
        return f"{self.schema_name}.{self.name}.copy"


class BackupSequence(_Frozen):
    """Where a sequence stands."""

    schema_name: str
    name: str
    last_value: int
    is_called: bool


class BackupManifest(_Frozen):
    """What a backup says of itself; `revisions` are by schema."""

    format: Literal["warmscale-backup"] = "warmscale-backup"
    format_version: Literal[1] = 1
    made_at: datetime
    warmscale: str
    postgresql: str
    revisions: dict[str, str]
    tables: tuple[BackupTable, ...]
    sequences: tuple[BackupSequence, ...]

    @property
    def num_rows(self) -> int:
        """Of all tables."""
        return sum(table.num_rows for table in self.tables)

    @property
    def num_bytes(self) -> int:
        """Of all tables, before compression."""
        return sum(table.num_bytes for table in self.tables)


class BackupWriter:
    """Writes tables into a backup, one after the other."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._archive = archive

    def table(
        self, schema_name: str, name: str, columns: tuple[str, ...], rows: Iterator[bytes]
    ) -> BackupTable:
        """Write a table's rows, which come in pieces of any size."""
        digest, num_rows, num_bytes = hashlib.sha256(), 0, 0
        with self._archive.open(f"{schema_name}.{name}.copy", "w", force_zip64=True) as member:
            for piece in rows:
                member.write(piece)
                digest.update(piece)
                num_rows += piece.count(b"\n")  # within a value COPY writes it as \n
                num_bytes += len(piece)
        return BackupTable(
            schema_name=schema_name,
            name=name,
            columns=columns,
            num_rows=num_rows,
            num_bytes=num_bytes,
            sha256=digest.hexdigest(),
        )

    def manifest(self, manifest: BackupManifest) -> None:
        """Write what makes it a backup."""
        self._archive.writestr(MANIFEST, manifest.model_dump_json(indent=2))


@contextmanager
def create_backup(path: Path) -> Generator[BackupWriter]:
    """A backup to write, which is at `path` when all went well; nothing is there otherwise.

    Only this user can read it: it holds the hashes of keys, and users' specs.

    Raises:
        BackupError: something is at `path` already, or it cannot be written.
    """
    if path.exists():
        raise BackupError(f"{path} exists; a backup replaces no file, so give another name")
    with ExitStack() as stack:
        try:
            file = stack.enter_context(write_file(path, mode=ONLY_THIS_USER, replace=False))
        except OSError as error:
            raise BackupError(f"cannot write {path}: {error.strerror}") from None
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive:
            yield BackupWriter(archive)
        try:
            stack.close()  # puts the file at `path`
        except FileExistsError:
            raise BackupError(f"{path} has come to exist meanwhile; give another name") from None


class BackupReader:
    """A backup that has been opened; `check` reads all of it."""

    def __init__(self, archive: zipfile.ZipFile, manifest: BackupManifest) -> None:
        self._archive, self.manifest = archive, manifest

    def rows(self, table: BackupTable) -> Iterator[bytes]:
        """A table's rows, in pieces of any size."""
        with self._archive.open(table.member) as member:
            while piece := member.read(_CHUNK_BYTES):
                yield piece

    def check(self, progress: Callable[[int], None]) -> None:
        """Read every table and compare it with its hash.

        Raises:
            BackupError: naming the table that is not what was written.
        """
        for table in self.manifest.tables:
            digest = hashlib.sha256()
            try:
                for piece in self.rows(table):
                    digest.update(piece)
                    progress(len(piece))
            except _DAMAGE as error:
                raise BackupError(f"the backup is damaged in {table.member}: {error}") from None
            if digest.hexdigest() != table.sha256:
                raise BackupError(
                    f"the backup is damaged: {table.member} has SHA-256 {digest.hexdigest()}, "
                    f"its manifest says {table.sha256}"
                )


@contextmanager
def open_backup(path: Path) -> Generator[BackupReader]:
    """A backup to read.

    Raises:
        BackupError: there is none, or it was cut short.
    """
    try:
        archive = zipfile.ZipFile(path)
    except OSError as error:
        raise BackupError(f"cannot read {path}: {error.strerror}") from None
    except _DAMAGE as error:
        raise BackupError(f"{path} is no backup, or was cut short: {error}") from None
    with archive:
        yield BackupReader(archive, _manifest(archive, path))


def _manifest(archive: zipfile.ZipFile, path: Path) -> BackupManifest:
    try:
        manifest = BackupManifest.model_validate_json(archive.read(MANIFEST))
    except KeyError:
        raise BackupError(f"{path} is no backup, or was cut short: no {MANIFEST} in it") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise BackupError(f"{path}: {MANIFEST}: {where}: {first['msg']}") from None
    except _DAMAGE as error:
        raise BackupError(f"{path} is damaged in {MANIFEST}: {error}") from None
    return manifest


_DAMAGE = (
    zipfile.BadZipFile,
    zipfile.LargeZipFile,
    zlib.error,
    EOFError,
    KeyError,
    NotImplementedError,
    RuntimeError,
    ValueError,
)
