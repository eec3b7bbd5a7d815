"""The check of everything that must always hold in the database; docs/guarantees.md lists it."""

from service.operations.invariants.check import (
    CheckReport,
    check_database,
    format_report,
    open_snapshot,
)
from service.operations.invariants.rules import Invariant, Violation

__all__ = [
    "CheckReport",
    "Invariant",
    "Violation",
    "check_database",
    "format_report",
    "open_snapshot",
]
