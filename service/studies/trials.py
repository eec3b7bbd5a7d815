"""A study's trials: the parameters that Optuna chose or a user enqueued, and their results."""

from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from service.database.tables import Run, Study
from service.lifecycle import FINAL_STUDY_STATES
from service.optuna_bridge.sampler import Sampler
from service.problems import bad_field, conflict
from service.specs.processes import check_batches
from service.specs.search_space import contains_value
from service.specs.stored import parse_stored
from service.specs.study import StudySpec
from service.studies.locks import lock_study
from service.studies.schemas import Importance, TrialPage, TrialView
from service.web.pagination import decode_number, encode_number
from warmcore.specs.fields import FieldError, format_reason

_FEWEST_FOR_IMPORTANCE = 4


def list_trials(
    session: Session, sampler: Sampler, study: Study, cursor: str | None, limit: int
) -> TrialPage:
    """Return a page of trials by number: those with a run and those that wait in Optuna's queue."""
    after = -1 if cursor is None else decode_number(cursor)
    spec = parse_stored(study.spec)
    # Read the waiting trials first: a trial that starts between the two reads then has its run.
    waiting = sampler.read_waiting_trials(study.optuna_name)
    trials = {n: _view_waiting(spec, n, params) for n, params in waiting.items() if n > after}
    query = select(Run).where(Run.study_id == study.id, Run.trial_number > after)
    for run in session.scalars(query.order_by(Run.trial_number).limit(limit + 1)):
        trial = _view_trial(run)
        trials[trial.number] = trial
    # All waiting trials were read, and the next limit + 1 runs: the first `limit` are complete.
    items = sorted(trials.values(), key=lambda trial: trial.number)
    more = len(items) > limit
    next_cursor = encode_number(items[limit - 1].number) if more else None
    return TrialPage(items=tuple(items[:limit]), next_cursor=next_cursor)


def enqueue_trial(
    session: Session, sampler: Sampler, study: Study, params: dict[str, Any], key: str | None
) -> TrialView:
    """Enqueue parameters as the next trial; the same idempotency key gives the same trial.

    Raises:
        Problem: 409 when no trial of the budget is left, or for a key that was used with other
            parameters; 422 for parameters outside of the search space.
    """
    study = lock_study(session, study.id)
    spec = parse_stored(study.spec)
    earlier = None if key is None else sampler.find_enqueued_trial(study.optuna_name, key)
    if earlier is not None:
        number, given = earlier
        if given != params:
            detail = f"Idempotency-Key {key!r} was used for trial {number}, with parameters {given}"
            raise conflict("idempotency-key-reused", detail)
        return _view_enqueued(session, study, spec, number, given)
    check_parameters(spec, params)
    if study.state in FINAL_STUDY_STATES:
        raise conflict("wrong-state", f"study {study.name!r} is {study.state}; it starts no trials")
    # Optuna's count includes trials that a crash left without a run: the next lease adopts them.
    if len(sampler.read_states(study.optuna_name)) >= spec.hpo.trials:
        detail = f"all {spec.hpo.trials} trials of study {study.name!r} are started or enqueued"
        raise conflict("budget-spent", detail)
    return _view_waiting(spec, sampler.enqueue_trial(study.optuna_name, params, key), params)


def _view_enqueued(
    session: Session, study: Study, spec: StudySpec, number: int, params: dict[str, Any]
) -> TrialView:
    """Return an enqueued trial as it is now: waiting, or with its run."""
    query = select(Run).where(Run.study_id == study.id, Run.trial_number == number)
    run = session.scalars(query).one_or_none()
    return _view_waiting(spec, number, params) if run is None else _view_trial(run)


def compute_importance(sampler: Sampler, study: Study) -> Importance:
    """Return each parameter's share in the variance of the loss over the finished trials.

    Raises:
        Problem: 409 while too few trials have finished.
    """
    states = sampler.read_states(study.optuna_name).values()
    complete = sum(state == "COMPLETE" for state, _ in states)
    if complete < _FEWEST_FOR_IMPORTANCE:
        detail = f"{complete} trials have finished; importances need {_FEWEST_FOR_IMPORTANCE}"
        raise conflict("too-few-trials", detail)
    return Importance(importance=sampler.compute_importance(study.optuna_name), trials=complete)


def _view_trial(run: Run) -> TrialView:
    return TrialView.model_validate(
        {
            "number": run.trial_number,
            "run_id": run.id,
            "state": run.state,
            "diverged": run.diverged,
            "params": run.params,
            "val_loss_nats": run.val_loss_nats,
            "step": run.step,
            "num_steps": run.num_steps,
            "attempt": run.attempt,
            "error": run.error,
        }
    )


def _view_waiting(spec: StudySpec, number: int, params: dict[str, Any]) -> TrialView:
    return TrialView(
        number=number,
        run_id=None,
        state="queued",
        params=params,
        val_loss_nats=None,
        step=0,
        num_steps=spec.trial_run(0).num_steps,
        attempt=0,
        error=None,
    )


def check_parameters(spec: StudySpec, params: dict[str, Any]) -> None:
    """Check enqueued parameters against the search space and the trials' resources.

    Raises:
        Problem: 422 naming the parameter, its value and the values that work.
    """
    for name, value in params.items():
        dimension = spec.search_space.get(name)
        if dimension is None:
            works = ", ".join(sorted(spec.search_space))
            raise bad_field(f"params.{name}", value, f"not in the search space: {works}")
        if not contains_value(dimension, value):
            works = f"outside the search space, which spans {list(dimension.bounds)}"
            raise bad_field(f"params.{name}", value, works)
    try:
        run = spec.trial_run(0).with_params(params)
        check_batches("params", spec.resources.trial, {}, run.train)
    except FieldError as error:
        raise bad_field("params.batch_size", params.get("batch_size"), str(error)) from None
    except ValueError as error:
        raise bad_field("params", params, format_reason(error)) from None
    # The grid sampler visits points; it does not sample the parameters that are left out.
    absent = sorted(set(spec.search_space) - set(params))
    if spec.hpo.sampler == "grid" and absent:
        raise bad_field(f"params.{absent[0]}", None, "sampler grid needs every parameter given")
