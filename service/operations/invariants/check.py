"""The one check of everything that must hold, in one snapshot of both schemas. Reads only."""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass

from sqlalchemy import Engine, text
from sqlalchemy.orm import Session

from service.operations.invariants import curves, files, leases, lifecycles, specs, trials
from service.operations.invariants.rules import Violation

_RULES = (*lifecycles.RULES, *leases.RULES, *trials.RULES)


@dataclass(frozen=True, kw_only=True)
class CheckReport:
    """`pending` is what the next lease request will mend, here or at a replica of a newer version.

    A database at rest has none.
    """

    violations: tuple[Violation, ...]
    pending: tuple[Violation, ...]


@contextmanager
def open_snapshot(engine: Engine) -> Generator[Session]:
    """A session that sees one moment of the database, and cannot change it."""
    with Session(engine) as session:
        session.execute(text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY"))
        yield session


def check_database(
    session: Session, *, at_rest: bool = False, with_files: bool = False
) -> CheckReport:
    """Check a database that may be in use, as the session's transaction sees it.

    `at_rest`: nothing is on its way any more, so what is pending is a violation as well.
    `with_files`: read every checkpoint that is kept, byte by byte. The files are of now: one that
    was superseded since may be gone, so this is for when nothing trains.
    """
    found = [(rule.at_rest, one) for rule in _RULES for one in rule.violations(session)]
    found += [(True, one) for one in specs.find_violations(session)]
    violations = [one for is_pending, one in found if at_rest or not is_pending]
    violations += curves.find_violations(session)
    violations += files.find_violations(session) if with_files else ()
    pending = [one for is_pending, one in found if is_pending and not at_rest]
    return CheckReport(violations=tuple(violations), pending=tuple(pending))


def format_report(report: CheckReport) -> str:
    """The report as lines, one for each violation, and a last one that sums up."""
    lines = [_line(one) for one in report.violations]
    lines += [f"pending: {_line(one)}" for one in report.pending]
    found = f"{len(report.violations)} violations, {len(report.pending)} pending"
    return "\n".join([*lines, found])


def _line(one: Violation) -> str:
    where = " ".join(name for name in (one.study_id, one.run_id) if name is not None)
    return f"{one.invariant}: {where}: {one.seen}"
