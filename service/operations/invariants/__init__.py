"""What must always hold of the database, checked from the outside. docs/guarantees.md says it."""

from service.operations.invariants.check import Report, check, described, snapshot
from service.operations.invariants.rules import Invariant, Violation

__all__ = ["Invariant", "Report", "Violation", "check", "described", "snapshot"]
