"""Which revision each of the two schemas is at, and which ones this program knows."""

from dataclasses import dataclass
from typing import Literal

from sqlalchemy import Connection, text

RevisionStatus = Literal["ready", "empty", "older", "newer"]


@dataclass(frozen=True, kw_only=True)
class Revision:
    """A schema's revision as found; `known` are this program's, oldest first."""

    schema: str
    found: str | None
    known: tuple[str, ...]

    @property
    def head(self) -> str:
        """The revision that this program works with."""
        return self.known[-1]

    @property
    def status(self) -> RevisionStatus:
        """Whether this program can work with what is there; one it does not know is newer."""
        if self.found is None:
            return "empty"
        if self.found not in self.known:
            return "newer"
        return "ready" if self.found == self.head else "older"

    def __str__(self) -> str:
        found = "has no tables" if self.found is None else f"is at {self.found}"
        return f"schema {self.schema} {found}, this version works with {self.head}"


class NewerDatabaseError(Exception):
    """A later version of warmscale, or of Optuna, has upgraded this database."""


def read_revision(connection: Connection, schema: str) -> str | None:
    """The revision of a schema; None: it has no tables of ours."""
    there = connection.execute(text("SELECT to_regclass(:name)"), {"name": f"{schema}.{_TABLE}"})
    if there.scalar() is None:
        return None
    return connection.execute(text(f"SELECT version_num FROM {schema}.{_TABLE}")).scalar()  # noqa: S608


def check_not_newer(revisions: tuple[Revision, ...]) -> None:
    """Refuse what only a later version can understand.

    Raises:
        NewerDatabaseError: naming both revisions.
    """
    newer = [revision for revision in revisions if revision.status == "newer"]
    if newer:
        works = "install the version that upgraded it, or restore a backup from before"
        raise NewerDatabaseError(f"{'; '.join(map(str, newer))}: {works}")


def describe_mismatch(revisions: tuple[Revision, ...]) -> str | None:
    """What keeps this program from serving these schemas, and what to do; None when nothing."""
    wrong = [revision for revision in revisions if revision.status != "ready"]
    if not wrong:
        return None
    newer = any(revision.status == "newer" for revision in wrong)
    works = "install the version that upgraded it" if newer else "run `warmscale db upgrade`"
    return f"{'; '.join(map(str, wrong))}: {works}"


_TABLE = "alembic_version"
