"""Queries behind a study's results and report. The session comes first; nothing here commits."""

from collections import defaultdict
from collections.abc import Iterable

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from service.lifecycle import FINAL_STUDY_STATES
from service.results.costs import costs_of
from service.results.schemas import (
    BestTrialResult,
    Costs,
    Evaluation,
    Growth,
    ReportTrial,
    StudyResults,
    TargetRun,
)
from service.results.verdict import Pending, judge
from service.studies.advance import base_of, best_trial
from service.studies.plan import target_seeds
from service.studies.schemas import RunCounts, StudySpec
from service.tables import Measurement, Run, Study
from warmcore.flops import growth_factors

MAX_TRIAL_CURVES = 100
_MAX_SEEDS = 100


def results(session: Session, study: Study) -> StudyResults:
    """Everything that the study has found so far."""
    spec = StudySpec.model_validate(study.spec)
    best = _best(session, study)
    targets = _targets(session, study, spec)
    own = tuple(t for t in targets if t.launch == 0)
    costs = costs_of(
        search_flops=_flops(session, study, "trial"),
        best_flops=best.cost_flops if best else None,
        targets=own,
        total_flops=_flops(session, study),
    )
    trials = _trial_counts(session, study)
    judged = _judge(study, spec, own, costs) or Pending(why=_before_target(study, spec, trials))
    pending = isinstance(judged, Pending)
    return StudyResults.model_validate(
        {
            "study_id": study.id,
            "study_name": study.name,
            "state": study.state,
            "reason": study.reason,
            "trials_budget": spec.hpo.trials,
            "trials": trials,
            "best_trial": best,
            "targets": targets,
            "costs": costs,
            "verdict": None if pending else judged,
            "pending": judged.why if pending else None,
        }
    )
