"""Trials: what Optuna chose and what became of it."""

from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from service.errors import conflict
from service.lifecycle import FINAL_STUDY_STATES
from service.sampler import Sampler
from service.studies.advance import lock
from service.studies.schemas import Importance, TrialList, TrialView
from service.studies.store import parameters_fit
from service.studies.study_spec import StudySpec
from service.tables import Run, Study
from warmcore.flops import num_steps

_FEWEST_FOR_IMPORTANCE = 4


def listing(session: Session, sampler: Sampler, study: Study) -> TrialList:
    """Trials by number: those with a run, and those still waiting to be asked for."""
    query = select(Run).where(Run.study_id == study.id, Run.kind == "trial")
    trials = {run.trial_number: _view(run) for run in session.scalars(query)}
    spec = StudySpec.model_validate(study.spec)
    for number, params in sampler.waiting(study.optuna_name).items():
        trials.setdefault(number, _waiting(spec, number, params))
    return TrialList(items=tuple(sorted(trials.values(), key=lambda trial: trial.number)))


def enqueue(
    session: Session, sampler: Sampler, study: Study, params: dict[str, Any], key: str | None
) -> TrialView:
    """Put parameters at the head of the queue; the same idempotency key gives the same trial.

    Raises:
        Problem: 409 when no trial of the budget is left, or for a key that was used with others;
            422 for parameters off the search space.
    """
    study = lock(session, study.id)
    spec = StudySpec.model_validate(study.spec)
    if key is not None and (before := sampler.enqueued(study.optuna_name, key)) is not None:
        number, given = before
        if given != params:
            detail = f"Idempotency-Key {key!r} was used for trial {number}, with parameters {given}"
            raise conflict("idempotency-key-reused", detail)
        return _as_it_is(session, study, number, given)
    parameters_fit(spec, params)
    if study.state in FINAL_STUDY_STATES:
        raise conflict("wrong-state", f"study {study.name!r} is {study.state}; it starts no trials")
    # By Optuna's count: a trial that a crash left without its run will be adopted.
    if len(sampler.states(study.optuna_name)) >= spec.hpo.trials:
        detail = f"all {spec.hpo.trials} trials of study {study.name!r} are started or enqueued"
        raise conflict("budget-spent", detail)
    return _waiting(spec, sampler.enqueue(study.optuna_name, params, key), params)


def _as_it_is(session: Session, study: Study, number: int, given: dict[str, Any]) -> TrialView:
    query = select(Run).where(Run.study_id == study.id, Run.trial_number == number)
    run = session.scalars(query).one_or_none()
    spec = StudySpec.model_validate(study.spec)
    return _waiting(spec, number, given) if run is None else _view(run)


def importance(sampler: Sampler, study: Study) -> Importance:
    """Importances from the finished trials.

    Raises:
        Problem: 409 while there are too few of them.
    """
    states = sampler.states(study.optuna_name).values()
    complete = sum(state == "COMPLETE" for state, _ in states)
    if complete < _FEWEST_FOR_IMPORTANCE:
        detail = f"{complete} trials have finished; importances need {_FEWEST_FOR_IMPORTANCE}"
        raise conflict("too-few-trials", detail)
    return Importance(importance=sampler.importance(study.optuna_name), trials=complete)


def _view(run: Run) -> TrialView:
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


def _waiting(spec: StudySpec, number: int, params: dict[str, Any]) -> TrialView:
    return TrialView(
        number=number,
        run_id=None,
        state="queued",
        params=params,
        val_loss_nats=None,
        step=0,
        num_steps=num_steps(spec.trial_run(0)),
        attempt=0,
        error=None,
    )
