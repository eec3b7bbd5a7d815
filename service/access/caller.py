"""The caller of a request: its key's scopes, and the project that limits its reads."""

from dataclasses import dataclass, replace

from sqlalchemy import ColumnElement, select, true

from service.database.tables import DEFAULT_PROJECT, Run, Study
from service.problems import not_found


@dataclass(frozen=True, kw_only=True)
class Caller:
    """The holder of an API key. Each store function takes a caller and reads no other's rows."""

    key_id: str
    scopes: frozenset[str]
    project: str | None  # None: every project

    def narrow_to(self, project: str | None) -> "Caller":
        """Return this caller, limited to one project.

        Raises:
            Problem: 404 for a project other than the key's: the answer does not tell if it exists.
        """
        # Example: a key of project a may send ?project=a or nothing. A key of every project (None)
        # may send any name.
        if project in (None, self.project):
            return self
        if self.project is not None:
            raise not_found("project", str(project))
        return replace(self, project=project)

    @property
    def home_project(self) -> str:
        """The project of the studies that this caller creates."""
        return self.project or DEFAULT_PROJECT

    def can_see(self, optuna_name: str) -> bool:
        """Return whether the caller can see the study of this name in Optuna.

        `tables.Study.optuna_name` is `name` in project `default`, and `project/name` in others.
        """
        project, slash, _ = optuna_name.partition("/")
        return self.project in (None, project if slash else DEFAULT_PROJECT)

    @property
    def study_filter(self) -> ColumnElement[bool]:
        """The SQL condition on `studies` that only rows of this caller meet."""
        return true() if self.project is None else Study.project == self.project

    @property
    def run_filter(self) -> ColumnElement[bool]:
        """The SQL condition on `runs` that only rows of this caller meet."""
        return (
            true()
            if self.project is None
            else Run.study_id.in_(select(Study.id).where(self.study_filter))
        )
