"""What must always hold of the database, checked from the outside. docs/guarantees.md says it."""

from service.invariants.check import Report, check, described, snapshot
from service.invariants.rules import Invariant, Violation

__all__ = ["Invariant", "Report", "Violation", "check", "described", "snapshot"]
