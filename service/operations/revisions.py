"""The revision of each of the two schemas, compared with the revisions of this program."""

from dataclasses import dataclass
from typing import Literal

from sqlalchemy import Connection, text

RevisionStatus = Literal["ready", "empty", "older", "newer"]
_TABLE = "alembic_version"  # Optuna uses Alembic too, and the same name for its table


@dataclass(frozen=True, kw_only=True)
class Revision:
    """A schema's revision in the database; `known` are this program's, oldest first."""

    schema: str
    found: str | None
    known: tuple[str, ...]

    @property
    def head(self) -> str:
        """The revision that this program works with."""
        return self.known[-1]

    @property
    def status(self) -> RevisionStatus:
        """The state of the schema for this program; a revision that it does not know is newer."""
        if self.found is None:
            return "empty"
        if self.found not in self.known:
            return "newer"
        return "ready" if self.found == self.head else "older"

    def __str__(self) -> str:
        found = "has no tables" if self.found is None else f"is at {self.found}"
        return f"schema {self.schema} {found}, this version works with {self.head}"


class NewerDatabaseError(Exception):
    """A database that a later version of warmscale, or of Optuna, has upgraded."""


def read_revision(connection: Connection, schema: str) -> str | None:
    """Return the revision of a schema; None if it has no tables."""
    table = f"{schema}.{_TABLE}"
    if connection.execute(text("SELECT to_regclass(:name)"), {"name": table}).scalar() is None:
        return None
    return connection.execute(text(f"SELECT version_num FROM {table}")).scalar()  # noqa: S608


def check_not_newer(revisions: tuple[Revision, ...]) -> None:
    """Refuse a database that only a later version can understand.

    Raises:
        NewerDatabaseError: naming both revisions.
    """
    newer = [revision for revision in revisions if revision.status == "newer"]
    if newer:
        works = "install the version that upgraded it, or restore a backup from before"
        raise NewerDatabaseError(f"{'; '.join(map(str, newer))}: {works}")


def describe_mismatch(revisions: tuple[Revision, ...]) -> str | None:
    """Name the schemas that this program cannot serve, and the remedy; None if it can serve all."""
    mismatches = [revision for revision in revisions if revision.status != "ready"]
    if not mismatches:
        return None
    newer = any(revision.status == "newer" for revision in mismatches)
    works = "install the version that upgraded it" if newer else "run `warmscale db upgrade`"
    return f"{'; '.join(map(str, mismatches))}: {works}"
