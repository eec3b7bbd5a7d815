"""The file of a backup: a zip of tables in COPY's text format, with a manifest of their hashes."""

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

# The manifest is the last member of the zip, so a file that was cut short has none. The zip's CRC
# protects the manifest, and the manifest's SHA-256 of each table protects the rows. For example
# warmscale.runs.copy, ..., optuna.trials.copy, backup.json.
MANIFEST = "backup.json"
_CHUNK_BYTES = 1 << 20


class BackupError(Exception):
    """A file that cannot be written, is no backup, or is damaged."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class BackupTable(_Frozen):
    """A table in the manifest: its rows are COPY text of these columns, a line per row."""

    schema_name: str
    name: str
    columns: tuple[str, ...]
    num_rows: int
    num_bytes: int
    sha256: str

    @property
    def member(self) -> str:
        """Name of the table's member in the zip."""
        return f"{self.schema_name}.{self.name}.copy"


class BackupSequence(_Frozen):
    """A sequence and the last number that it gave out."""

    schema_name: str
    name: str
    last_value: int
    is_called: bool


class BackupManifest(_Frozen):
    """The manifest of a backup; `revisions` has the revision of each schema."""

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
        """Rows of all tables."""
        return sum(table.num_rows for table in self.tables)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tables, before compression."""
        return sum(table.num_bytes for table in self.tables)


class BackupWriter:
    """A backup that is being written, table by table."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._archive = archive

    def write_table(
        self, schema_name: str, name: str, columns: tuple[str, ...], rows: Iterator[bytes]
    ) -> BackupTable:
        """Write a table and return its entry in the manifest; `rows` are pieces of any size."""
        digest, num_rows, num_bytes = hashlib.sha256(), 0, 0
        with self._archive.open(f"{schema_name}.{name}.copy", "w", force_zip64=True) as member:
            for piece in rows:
                member.write(piece)
                digest.update(piece)
                num_rows += piece.count(b"\n")  # COPY writes a line feed inside a value as `\n`
                num_bytes += len(piece)
        return BackupTable(
            schema_name=schema_name,
            name=name,
            columns=columns,
            num_rows=num_rows,
            num_bytes=num_bytes,
            sha256=digest.hexdigest(),
        )

    def write_manifest(self, manifest: BackupManifest) -> None:
        """Write the manifest, the last member."""
        self._archive.writestr(MANIFEST, manifest.model_dump_json(indent=2))


@contextmanager
def create_backup(path: Path) -> Generator[BackupWriter]:
    """Open a backup for writing; it appears at `path` only if the block ends without an error.

    Only this user can read the file: it holds the hashes of keys, and users' specs.

    Raises:
        BackupError: `path` exists already or cannot be written.
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
    """A backup that is open for reading; `check_hashes` reads all of it."""

    def __init__(self, archive: zipfile.ZipFile, manifest: BackupManifest) -> None:
        self._archive, self.manifest = archive, manifest

    def read_rows(self, table: BackupTable) -> Iterator[bytes]:
        """Yield a table's rows in pieces of any size."""
        with self._archive.open(table.member) as member:
            while piece := member.read(_CHUNK_BYTES):
                yield piece

    def check_hashes(self, progress: Callable[[int], None]) -> None:
        """Read every table and compare it with its hash; call `progress` with bytes.

        Raises:
            BackupError: a table does not have its hash; the message names it.
        """
        for table in self.manifest.tables:
            digest = hashlib.sha256()
            try:
                for piece in self.read_rows(table):
                    digest.update(piece)
                    progress(len(piece))
            except _DAMAGE_ERRORS as error:
                raise BackupError(f"the backup is damaged in {table.member}: {error}") from None
            if digest.hexdigest() != table.sha256:
                raise BackupError(
                    f"the backup is damaged: {table.member} has SHA-256 {digest.hexdigest()}, "
                    f"its manifest says {table.sha256}"
                )


@contextmanager
def open_backup(path: Path) -> Generator[BackupReader]:
    """Open a backup for reading.

    Raises:
        BackupError: there is no backup at `path`, or it was cut short.
    """
    try:
        archive = zipfile.ZipFile(path)
    except OSError as error:
        raise BackupError(f"cannot read {path}: {error.strerror}") from None
    except _DAMAGE_ERRORS as error:
        raise BackupError(f"{path} is no backup, or was cut short: {error}") from None
    with archive:
        yield BackupReader(archive, _read_manifest(archive, path))


def _read_manifest(archive: zipfile.ZipFile, path: Path) -> BackupManifest:
    try:
        manifest = BackupManifest.model_validate_json(archive.read(MANIFEST))
    except KeyError:
        raise BackupError(f"{path} is no backup, or was cut short: no {MANIFEST} in it") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise BackupError(f"{path}: {MANIFEST}: {where}: {first['msg']}") from None
    except _DAMAGE_ERRORS as error:
        raise BackupError(f"{path} is damaged in {MANIFEST}: {error}") from None
    return manifest


# A damaged zip raises any of these, at opening or in the middle of a member: a flipped bit in a
# header may ask for a compression that does not exist (NotImplementedError) or for a password
# (RuntimeError).
_DAMAGE_ERRORS = (
    zipfile.BadZipFile,
    zipfile.LargeZipFile,
    zlib.error,
    EOFError,
    KeyError,
    NotImplementedError,
    RuntimeError,
    ValueError,
)
