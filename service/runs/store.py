"""Reading runs, their curves and checkpoints; the best trial; the row of a new run."""

from sqlalchemy import ColumnElement, select, tuple_
from sqlalchemy.orm import Session

from service.access.caller import Caller
from service.database.tables import Checkpoint, Run, Study
from service.database.tables import Measurement as MeasurementRow
from service.runs.schemas import CheckpointView, MeasurementPage, MeasurementView, RunPage, RunView
from service.specs.study import StudySpec
from service.web.pagination import decode_cursor, decode_number, encode_cursor, encode_number
from warmcore.specs import RunSpec
from warmcore.specs.sizes import flops_per_token


def view_run(run: Run, study_name: str) -> RunView:
    """Return the run as the API shows it."""
    # A view has the names of the row's columns, but for the study's name.
    same = {name: getattr(run, name) for name in RunView.model_fields if hasattr(run, name)}
    return RunView.model_validate(same | {"study_name": study_name})


def list_runs(
    session: Session,
    caller: Caller,
    filters: list[ColumnElement[bool]],
    cursor: str | None,
    limit: int,
) -> RunPage:
    """Return a page of the caller's runs with their studies' names, newest first."""
    query = select(Run, Study.name).join(Study, Study.id == Run.study_id)
    query = query.where(caller.study_filter, *filters)
    # One row more than the page holds tells whether there is a next page.
    query = query.order_by(Run.created_at.desc(), Run.id.desc()).limit(limit + 1)
    if cursor is not None:
        query = query.where(tuple_(Run.created_at, Run.id) < decode_cursor(cursor))
    rows = list(session.execute(query))
    last: Run | None = rows[limit - 1][0] if len(rows) > limit else None
    return RunPage(
        items=tuple(view_run(run, name) for run, name in rows[:limit]),
        next_cursor=encode_cursor(last.created_at, last.id) if last else None,
    )


def list_measurements(
    session: Session, run_id: str, cursor: str | None, limit: int
) -> MeasurementPage:
    """Return a page of the run's curve, ordered by step."""
    fields = tuple(MeasurementView.model_fields)
    query = select(*(getattr(MeasurementRow, field) for field in fields))
    # A step has a single point, so the step alone is the cursor.
    query = query.where(MeasurementRow.run_id == run_id)
    if cursor is not None:
        query = query.where(MeasurementRow.step > decode_number(cursor))
    rows = session.execute(query.order_by(MeasurementRow.step).limit(limit + 1)).mappings().all()
    return MeasurementPage(
        items=tuple(MeasurementView(**row) for row in rows[:limit]),
        next_cursor=encode_number(rows[limit - 1]["step"]) if len(rows) > limit else None,
    )


def list_checkpoints(session: Session, run_id: str) -> tuple[CheckpointView, ...]:
    """Return the run's kept checkpoints as the API shows them, newest first."""
    fields = tuple(CheckpointView.model_fields)
    return tuple(
        CheckpointView(**{f: getattr(row, f) for f in fields})
        for row in load_kept_checkpoints(session, run_id)
    )


def load_kept_checkpoints(session: Session, run_id: str) -> list[Checkpoint]:
    """Return the rows of checkpoints that have files, the highest step first."""
    query = select(Checkpoint).where(Checkpoint.run_id == run_id, ~Checkpoint.superseded)
    return list(session.scalars(query.order_by(Checkpoint.step.desc(), Checkpoint.attempt.desc())))


def find_best_trial(session: Session, study_id: str) -> Run | None:
    """Return the succeeded trial with the lowest validation loss; of equal losses the earliest."""
    query = (
        select(Run)
        .where(Run.study_id == study_id, Run.kind == "trial", Run.state == "succeeded")
        .order_by(Run.val_loss_nats, Run.trial_number)
        .limit(1)
    )
    return session.scalars(query).one_or_none()


def find_best_growable(session: Session, study_id: str) -> Run | None:
    """Return the best succeeded trial that has a final checkpoint.

    A worker of another framework may publish none, and the overall best trial cannot be grown then.
    """
    query = (
        select(Run)
        .join(Checkpoint, Checkpoint.run_id == Run.id)
        .where(Run.study_id == study_id, Run.kind == "trial", Run.state == "succeeded")
        .where(Checkpoint.final, ~Checkpoint.superseded)
        .order_by(Run.val_loss_nats, Run.trial_number)
        .limit(1)
    )
    return session.scalars(query).one_or_none()


def make_run(study: Study, spec: StudySpec, run: RunSpec, params: dict[str, object]) -> Run:
    """Build a run's row with its sizes computed; the caller sets its kind and its resources."""
    # The sizes are stored since the database computes a run's cost from them and reads no spec.
    return Run(
        study_id=study.id,
        spec=run.model_dump(mode="json"),
        params=params,
        seed=run.seed,
        max_attempts=spec.max_attempts,
        num_steps=run.num_steps,
        num_tokens=run.num_tokens,
        flops_per_token=flops_per_token(run.model, run.data.context),
    )
