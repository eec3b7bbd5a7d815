"""Queries on studies. The session comes first; nothing here commits."""

from collections.abc import Sequence
from typing import Any, TypeVarTuple

from sqlalchemy import Select, func, select, tuple_, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from service.caller import Caller
from service.cursor import decode_cursor, encode_cursor
from service.errors import Problem, bad_field, conflict, not_found
from service.events import record
from service.lifecycle import LIVE_RUN_STATES, sources
from service.protocol import StudyState
from service.studies.advance import best_trial, cancel_runs, lock
from service.studies.schemas import BestTrial, RunCounts, StudyPage, StudyView
from service.studies.sharing import check_batches
from service.studies.space import FieldError, contains, reason
from service.studies.specs import parsed
from service.studies.study_spec import StudySpec
from service.tables import Run, Study

_ENDED = ("completed", "failed")
Ts = TypeVarTuple("Ts")


def create(session: Session, caller: Caller, spec: StudySpec, idempotency_key: str | None) -> Study:
    """Write a study of the caller's project; the same idempotency key gives the same study.

    Raises:
        Problem: 409 for a name that is taken, or for a key that was used with another spec.
    """
    again = _made_before(session, caller, idempotency_key)
    if again is not None:
        return _same(again, spec, idempotency_key)
    values = {"project": caller.home, "name": spec.name, "spec": spec.model_dump(mode="json")}
    statement = insert(Study).values(**values, idempotency_key=idempotency_key)
    statement = statement.on_conflict_do_nothing().returning(Study)
    study = session.scalars(statement).one_or_none()
    if study is None:
        return _lost_the_race(session, caller, spec, idempotency_key)
    record(session, "study.created", study_id=study.id, name=study.name)
    return study


def _made_before(session: Session, caller: Caller, idempotency_key: str | None) -> Study | None:
    if idempotency_key is None:
        return None
    query = select(Study).where(
        Study.project == caller.home, Study.idempotency_key == idempotency_key
    )
    return session.scalar(query)


def _lost_the_race(
    session: Session, caller: Caller, spec: StudySpec, idempotency_key: str | None
) -> Study:
    again = _made_before(session, caller, idempotency_key)
    if again is not None:
        return _same(again, spec, idempotency_key)
    field = bad_field("name", spec.name, "a study of this name exists; choose another name")
    raise Problem(409, "duplicate-name", field.detail, field.errors)


def _same(study: Study, spec: StudySpec, idempotency_key: str | None) -> Study:
    before = parsed(study.spec)
    if before.unpinned() != spec.unpinned():
        detail = (
            f"Idempotency-Key {idempotency_key!r} was used for study {study.name!r}, "
            "whose spec is another"
        )
        raise conflict("idempotency-key-reused", detail)
    return study


def find(session: Session, caller: Caller, name_or_id: str) -> Study:
    """The study of this id or name, as far as this caller can see.

    Raises:
        Problem: 404 when there is none; 409 for a name that several of the caller's projects have.
    """
    return _only(session.scalars(_named(select(Study), caller, name_or_id)).all(), name_or_id)


def find_id(session: Session, caller: Caller, name_or_id: str) -> str:
    """As `find`, its id alone."""
    query = _named(select(Study.id, Study.project), caller, name_or_id)
    return _only(session.execute(query).all(), name_or_id).id


def _named(query: Select[*Ts], caller: Caller, name_or_id: str) -> Select[*Ts]:
    named = (Study.id == name_or_id) | (Study.name == name_or_id)
    return query.where(named, caller.studies).order_by(Study.id != name_or_id, Study.project)


def _only(found: Sequence[Any], name_or_id: str) -> Any:
    if not found:
        raise not_found("study", name_or_id)
    if len(found) > 1 and found[0].id != name_or_id:
        projects = ", ".join(study.project for study in found)
        detail = f"study {name_or_id!r} is in projects {projects}; name one with ?project="
        raise conflict("ambiguous-name", detail)
    return found[0]


def page(session: Session, caller: Caller, cursor: str | None, limit: int) -> StudyPage:
    """The caller's studies, newest first."""
    query = select(Study).where(caller.studies)
    query = query.order_by(Study.created_at.desc(), Study.id.desc()).limit(limit + 1)
    if cursor is not None:
        query = query.where(tuple_(Study.created_at, Study.id) < decode_cursor(cursor))
    rows = list(session.scalars(query))
    more = rows[limit - 1] if len(rows) > limit else None
    return StudyPage(
        items=tuple(view(session, row) for row in rows[:limit]),
        next_cursor=encode_cursor(more.created_at, more.id) if more else None,
    )


def change_state(session: Session, study: Study, state: StudyState) -> Study:
    """Move a study to `state` if its state allows it; asking for the state it is in is fine.

    To cancel a study that has ended cancels the targets that were started by hand after it.

    Raises:
        Problem: 409 when the state does not allow it.
    """
    study = lock(session, study.id)
    if study.state == state:
        return study
    if state == "cancelled" and study.state in _ENDED and cancel_runs(session, study.id):
        return study
    changed = session.scalars(
        update(Study)
        .where(Study.id == study.id, Study.state.in_(sources(state)))
        .values(state=state, finished_at=func.now() if state == "cancelled" else None)
        .returning(Study)
        .execution_options(populate_existing=True)
    ).one_or_none()
    if changed is None:
        raise conflict(
            "wrong-state", f"study {study.name!r} is {study.state}; it cannot become {state}"
        )
    record(session, f"study.{state}", study_id=study.id)
    if state == "cancelled":
        cancel_runs(session, study.id)
    return changed


def view(session: Session, study: Study) -> StudyView:
    """The study as it is read: state, counts, best trial, progress, cost so far."""
    spec = parsed(study.spec)
    counts = _counts(session, study.id)
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
            "best_trial": _best(session, study.id),
            "progress": _progress(spec, study.state, counts),
            "cost_flops": cost or 0.0,
            "warnings": tuple(spec.warnings()),
            "spec": spec,
            "created_at": study.created_at,
            "finished_at": study.finished_at,
        }
    )


def _counts(session: Session, study_id: str) -> dict[str, dict[str, int]]:
    query = (
        select(Run.kind, Run.state, func.count())
        .where(Run.study_id == study_id)
        .group_by(Run.kind, Run.state)
    )
    counts: dict[str, dict[str, int]] = {"trial": {}, "target": {}}
    for kind, state, count in session.execute(query):
        counts[kind][state] = count
    return counts


def _best(session: Session, study_id: str) -> BestTrial | None:
    run = best_trial(session, study_id)
    if run is None or run.trial_number is None or run.val_loss_nats is None:
        return None
    return BestTrial(
        number=run.trial_number,
        run_id=run.id,
        val_loss_nats=run.val_loss_nats,
        params=run.params,
    )


def _progress(spec: StudySpec, state: str, counts: dict[str, dict[str, int]]) -> float:
    if state == "completed":
        return 1.0
    expected = spec.hpo.trials + spec.num_target_runs
    live = frozenset(LIVE_RUN_STATES)
    done = sum(
        n for kind in counts.values() for run_state, n in kind.items() if run_state not in live
    )
    return min(1.0, done / expected)


def parameters_fit(spec: StudySpec, params: dict[str, Any]) -> None:
    """Check enqueued parameters against the search space.

    Raises:
        Problem: 422 naming the parameter, its value and what works.
    """
    for name, value in params.items():
        dimension = spec.search_space.get(name)
        if dimension is None:
            works = ", ".join(sorted(spec.search_space))
            raise bad_field(f"params.{name}", value, f"not in the search space: {works}")
        if not contains(dimension, value):
            works = f"outside the search space, which spans {list(dimension.bounds)}"
            raise bad_field(f"params.{name}", value, works)
    try:
        run = spec.trial_run(0).with_params(params)
        check_batches("params", spec.resources.trial, {}, run.train)
    except FieldError as error:
        raise bad_field("params.batch_size", params.get("batch_size"), str(error)) from None
    except ValueError as error:
        raise bad_field("params", params, reason(error)) from None
    absent = sorted(set(spec.search_space) - set(params))
    if spec.hpo.sampler == "grid" and absent:
        raise bad_field(f"params.{absent[0]}", None, "sampler grid needs every parameter given")
