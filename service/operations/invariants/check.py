"""The check of all invariants, in one snapshot of both schemas. It only reads."""

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
    """The result of a check.

    `pending` lists inconsistencies that the next lease request repairs, on this replica or on a
    replica of a newer version. They are normal while requests are in flight; an idle database has
    none.
    """

    violations: tuple[Violation, ...]
    pending: tuple[Violation, ...]


@contextmanager
def open_snapshot(engine: Engine) -> Generator[Session]:
    """Open a session that reads one moment of the database and cannot change it."""
    # REPEATABLE READ keeps the snapshot of the first query for all rules. Otherwise a run that
    # ends between two rules would look like a run without its event.
    with Session(engine) as session:
        session.execute(text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY"))
        yield session


def check_database(
    session: Session, *, at_rest: bool = False, with_files: bool = False
) -> CheckReport:
    """Check the database as the session's transaction reads it; it may be in use.

    Args:
        session: A session from `open_snapshot`.
        at_rest: Count pending inconsistencies as violations, because no request is in flight.
        with_files: Read every byte of every kept checkpoint. Use it when nothing trains: a
            checkpoint that a worker replaces after the snapshot may be gone from the disk.
    """
    found = [
        (rule.at_rest, violation) for rule in _RULES for violation in rule.find_violations(session)
    ]
    # A replica of a newer version can read the spec that this version cannot: pending.
    found += [(True, violation) for violation in specs.find_violations(session)]
    violations = [violation for is_pending, violation in found if at_rest or not is_pending]
    violations += curves.find_violations(session)
    violations += files.find_violations(session) if with_files else ()
    pending = [violation for is_pending, violation in found if is_pending and not at_rest]
    return CheckReport(violations=tuple(violations), pending=tuple(pending))


def format_report(report: CheckReport) -> str:
    """Return the report as lines: each violation, each pending inconsistency, and the sums."""
    lines = [_format_violation(violation) for violation in report.violations]
    lines += [f"pending: {_format_violation(violation)}" for violation in report.pending]
    sums = f"{len(report.violations)} violations, {len(report.pending)} pending"
    return "\n".join([*lines, sums])


def _format_violation(violation: Violation) -> str:
    names = (violation.study_id, violation.run_id)
    where = " ".join(name for name in names if name is not None)
    return f"{violation.invariant}: {where}: {violation.seen}"
