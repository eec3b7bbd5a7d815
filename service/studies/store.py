"""Queries on studies: create, list, view, change the state. Nothing here commits."""

from sqlalchemy import func, select, tuple_, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from service.access.caller import Caller
from service.database.tables import Run, Study
from service.events.audit_log import record_event
from service.lifecycle import LIVE_RUN_STATES, source_states
from service.problems import Problem, bad_field, conflict
from service.protocol import StudyState
from service.runs.store import find_best_trial
from service.specs.stored import parse_stored
from service.specs.study import StudySpec
from service.studies.advance import cancel_runs
from service.studies.locks import lock_study
from service.studies.schemas import BestTrial, RunCounts, StudyPage, StudyView
from service.web.pagination import decode_cursor, encode_cursor

_ENDED = ("completed", "failed")


def create_study(
    session: Session, caller: Caller, spec: StudySpec, idempotency_key: str | None
) -> Study:
    """Write a study of the caller's project; the same idempotency key gives the same study.

    Raises:
        Problem: 409 for a name that is taken, or for a key that was used with another spec.
    """
    earlier = _find_by_key(session, caller, idempotency_key)
    if earlier is not None:
        return _check_same_spec(earlier, spec, idempotency_key)
    values = {
        "project": caller.home_project,
        "name": spec.name,
        "spec": spec.model_dump(mode="json"),
    }
    statement = insert(Study).values(**values, idempotency_key=idempotency_key)
    # Two requests with the same name or key may insert at once: the loser waits for the winner's
    # commit and gets no row.
    statement = statement.on_conflict_do_nothing().returning(Study)
    study = session.scalars(statement).one_or_none()
    if study is None:
        return _resolve_conflict(session, caller, spec, idempotency_key)
    record_event(session, "study.created", study_id=study.id, name=study.name)
    return study


def _find_by_key(session: Session, caller: Caller, idempotency_key: str | None) -> Study | None:
    if idempotency_key is None:
        return None
    query = select(Study).where(
        Study.project == caller.home_project, Study.idempotency_key == idempotency_key
    )
    return session.scalar(query)


def _resolve_conflict(
    session: Session, caller: Caller, spec: StudySpec, idempotency_key: str | None
) -> Study:
    """Return the study that the same key has just created; raise 409 for a name that is taken."""
    earlier = _find_by_key(session, caller, idempotency_key)
    if earlier is not None:
        return _check_same_spec(earlier, spec, idempotency_key)
    field = bad_field("name", spec.name, "a study of this name exists; choose another name")
    raise Problem(409, "duplicate-name", field.detail, field.errors)


def _check_same_spec(study: Study, spec: StudySpec, idempotency_key: str | None) -> Study:
    # The corpus may have changed between the two requests: compare the specs without its hashes.
    earlier = parse_stored(study.spec)
    if earlier.without_pins() != spec.without_pins():
        detail = (
            f"Idempotency-Key {idempotency_key!r} was used for study {study.name!r}, "
            "which has another spec"
        )
        raise conflict("idempotency-key-reused", detail)
    return study


def list_studies(session: Session, caller: Caller, cursor: str | None, limit: int) -> StudyPage:
    """Return a page of the caller's studies, newest first."""
    query = select(Study).where(caller.study_filter)
    # One row more than the page holds tells whether there is a next page.
    query = query.order_by(Study.created_at.desc(), Study.id.desc()).limit(limit + 1)
    if cursor is not None:
        query = query.where(tuple_(Study.created_at, Study.id) < decode_cursor(cursor))
    rows = list(session.scalars(query))
    more = rows[limit - 1] if len(rows) > limit else None
    return StudyPage(
        items=tuple(view_study(session, row) for row in rows[:limit]),
        next_cursor=encode_cursor(more.created_at, more.id) if more else None,
    )


def change_state(session: Session, study: Study, state: StudyState) -> Study:
    """Move a study to `state`, if its present state allows that; the same state changes nothing.

    Cancelling a study that has ended cancels the targets that were started by hand after its end.

    Raises:
        Problem: 409 if the present state does not allow it.
    """
    study = lock_study(session, study.id)
    if study.state == state:
        return study
    if state == "cancelled" and study.state in _ENDED and cancel_runs(session, study.id):
        return study
    changed = session.scalars(
        update(Study)
        .where(Study.id == study.id, Study.state.in_(source_states(state)))
        .values(state=state, finished_at=func.now() if state == "cancelled" else None)
        .returning(Study)
        .execution_options(populate_existing=True)
    ).one_or_none()
    if changed is None:
        raise conflict(
            "wrong-state", f"study {study.name!r} is {study.state}; it cannot become {state}"
        )
    record_event(session, f"study.{state}", study_id=study.id)
    if state == "cancelled":
        cancel_runs(session, study.id)
    return changed


def view_study(session: Session, study: Study) -> StudyView:
    """Return the study as the API shows it: state, counts, best trial, progress, cost so far."""
    spec = parse_stored(study.spec)
    counts = _count_runs(session, study.id)
    cost = session.scalar(select(func.sum(Run.cost_flops)).where(Run.study_id == study.id))
    return StudyView.model_validate(
        {
            "id": study.id,
            "project": study.project,
            "name": study.name,
            "state": study.state,
            "reason": study.reason,
            "trials": RunCounts(**counts["trial"]),
            "targets": RunCounts(**counts["target"]),
            "trials_budget": spec.hpo.trials,
            "best_trial": _view_best_trial(session, study.id),
            "progress": _compute_progress(spec, study.state, counts),
            "cost_flops": cost or 0.0,
            "warnings": tuple(spec.find_warnings()),
            "spec": spec,
            "created_at": study.created_at,
            "finished_at": study.finished_at,
        }
    )


def _count_runs(session: Session, study_id: str) -> dict[str, dict[str, int]]:
    query = (
        select(Run.kind, Run.state, func.count())
        .where(Run.study_id == study_id)
        .group_by(Run.kind, Run.state)
    )
    counts: dict[str, dict[str, int]] = {"trial": {}, "target": {}}
    for kind, state, count in session.execute(query):
        counts[kind][state] = count
    return counts


def _view_best_trial(session: Session, study_id: str) -> BestTrial | None:
    run = find_best_trial(session, study_id)
    if run is None or run.trial_number is None or run.val_loss_nats is None:
        return None
    return BestTrial(
        number=run.trial_number,
        run_id=run.id,
        val_loss_nats=run.val_loss_nats,
        params=run.params,
    )


def _compute_progress(spec: StudySpec, state: str, counts: dict[str, dict[str, int]]) -> float:
    if state == "completed":
        return 1.0
    # Targets that were started by hand count as finished but not as expected: hence the minimum.
    expected = spec.hpo.trials + spec.num_target_runs
    live = frozenset(LIVE_RUN_STATES)
    done = sum(
        n for kind in counts.values() for run_state, n in kind.items() if run_state not in live
    )
    return min(1.0, done / expected)
