"""The rule on specs: this version can read the specs of the studies that have not ended."""

from collections.abc import Iterator

from sqlalchemy import select
from sqlalchemy.orm import Session

from service.database.tables import Study
from service.lifecycle import FINAL_STUDY_STATES
from service.operations.invariants.rules import Violation
from service.specs.stored import UnreadableSpecError, parse_stored


def find_violations(session: Session) -> Iterator[Violation]:
    """Yield each live study that only another version of the service can read."""
    # A study that has ended needs no reader: its results are in the tables.
    query = select(Study.id, Study.spec).where(Study.state.not_in(FINAL_STUDY_STATES))
    for study_id, spec in session.execute(query.order_by(Study.id)):
        try:
            parse_stored(spec)
        except UnreadableSpecError as error:
            yield Violation(
                invariant="specs-read", study_id=study_id, run_id=None, seen=error.detail
            )
