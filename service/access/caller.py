"""Who asks: a key's scopes, and the project outside of which nothing exists for it."""

from dataclasses import dataclass, replace

from sqlalchemy import ColumnElement, select, true

from service.database.tables import DEFAULT_PROJECT, Run, Study
from service.problems import not_found


@dataclass(frozen=True, kw_only=True)
class Caller:
    """The holder of a key. Stores take it wherever they read: there is no reading without one."""

    key_id: str
    scopes: frozenset[str]
    project: str | None  # None: every project

    def narrow_to(self, project: str | None) -> "Caller":
        """This caller, narrowed to one project.

        Raises:
            Problem: 404 for another project than the key's, whether or not there is one.
        """
        if project in (None, self.project):
            return self
        if self.project is not None:
            raise not_found("project", str(project))
        return replace(self, project=project)

    @property
    def home(self) -> str:
        """The project of what this caller makes."""
        return self.project or DEFAULT_PROJECT

    def can_see(self, optuna_name: str) -> bool:
        """Whether a study is there for this caller, by its name in Optuna (`tables.Study`)."""
        project, slash, _ = optuna_name.partition("/")
        return self.project in (None, project if slash else DEFAULT_PROJECT)

    @property
    def studies(self) -> ColumnElement[bool]:
        """Which studies there are for this caller."""
        return true() if self.project is None else Study.project == self.project

    @property
    def runs(self) -> ColumnElement[bool]:
        """Which runs there are for this caller."""
        return (
            true()
            if self.project is None
            else Run.study_id.in_(select(Study.id).where(self.studies))
        )
