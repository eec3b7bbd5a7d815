"""Queries behind a study's results and report. The session comes first; nothing here commits."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict
from typing import get_args

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from service.database.tables import Measurement, Run, Study
from service.protocol import RunState
from service.results.budgets import ComputeCosts, judge_budgets, select_branch_runs
from service.results.costs import compute_costs
from service.results.numbers import thin_points
from service.results.schemas import (
    BestTrialResult,
    Costs,
    Evaluation,
    Growth,
    ReportTrial,
    StudyResults,
    TargetRun,
    Verdict,
)
from service.results.verdict import Pending, judge_runs
from service.results.wording import explain_missing_target
from service.runs.store import find_best_growable, find_best_trial
from service.specs.stored import parse_stored
from service.specs.study import StudySpec
from service.studies.advance import find_base
from service.studies.schemas import RunCounts
from warmcore.specs.sizes import growth_factors

MAX_TRIAL_CURVES = 100
MAX_TRIAL_POINTS = 200
# The limit of evaluations in a run, so that the verdict uses every numbered evaluation.
MAX_JUDGED_POINTS = 10_000
MAX_SHOWN_POINTS = 1000


def load_results(session: Session, study: Study) -> StudyResults:
    """Return best trial, target runs, costs and verdict of a study, as far as it has come."""
    spec = parse_stored(study.spec)
    best = _load_best_trial(session, study.id)
    targets = _load_targets(session, study.id)
    trials = _count_trials(session, study.id)
    flops = _sum_flops_by_kind(session, study.id)
    # The study's own targets are launch 0. The verdict and the costs leave out targets that a user
    # started by hand: another model or another budget would not pair with them.
    own = tuple(t for t in targets if t.launch == 0)

    def costs_at(branch: int) -> Costs:
        return compute_costs(
            search_flops=flops.get("trial", 0.0),
            best_flops=best.cost_flops if best else None,
            targets=own,
            total_flops=sum(flops.values()),
            branch=branch,
        )

    has_budgets = own and spec.budgets
    budgets = (
        judge_budgets(own, spec.budgets, _compute_growth(spec), costs_at) if has_budgets else ()
    )
    judged = _judge_study(study, spec, own, trials, costs_at)
    return StudyResults(
        study_id=study.id,
        study_name=study.name,
        state=study.state,  # pyright: ignore[reportArgumentType] - checked by the database
        reason=study.reason,
        trials_budget=spec.hpo.trials,
        trials=trials,
        best_trial=best,
        targets=tuple(_thin_curve(target) for target in targets),
        costs=costs_at(len(spec.budgets)),
        verdict=judged if isinstance(judged, Verdict) else None,
        pending=judged.why if isinstance(judged, Pending) else None,
        budgets=budgets,
    )


def _thin_curve(target: TargetRun) -> TargetRun:
    return target.model_copy(update={"curve": tuple(thin_points(target.curve, MAX_SHOWN_POINTS))})


def _compute_growth(spec: StudySpec) -> Growth:
    factors = growth_factors(spec.base_model, spec.rung_model(len(spec.rungs) - 1))
    return Growth(**asdict(factors))


def _judge_study(
    study: Study,
    spec: StudySpec,
    own: tuple[TargetRun, ...],
    trials: RunCounts,
    costs_at: ComputeCosts,
) -> Verdict | Pending:
    """Judge the study's own targets, at the largest budget where there are several."""
    if not own or not spec.rungs:
        return Pending(why=explain_missing_target(spec, study.state, study.reason, trials))
    last = len(spec.budgets)
    runs = select_branch_runs(own, last)
    return judge_runs(runs, growth=_compute_growth(spec), costs=costs_at(last))


def _count_trials(session: Session, study_id: str) -> RunCounts:
    query = (
        select(Run.state, func.count())
        .where(Run.study_id == study_id, Run.kind == "trial")
        .group_by(Run.state)
    )
    counts: dict[str, int] = dict(session.execute(query).all())
    return RunCounts.model_validate({s: counts.get(s, 0) for s in get_args(RunState)})


def _sum_flops_by_kind(session: Session, study_id: str) -> dict[str, float]:
    query = (
        select(Run.kind, func.sum(Run.cost_flops))
        .where(Run.study_id == study_id)
        .group_by(Run.kind)
    )
    return {kind: flops or 0.0 for kind, flops in session.execute(query)}


def _load_best_trial(session: Session, study_id: str) -> BestTrialResult | None:
    # The best trial with a checkpoint is the base of the targets. While no trial has published a
    # final checkpoint, show the best loss anyway.
    run = find_best_growable(session, study_id) or find_best_trial(session, study_id)
    if run is None or run.trial_number is None or run.val_loss_nats is None:
        return None
    base = find_base(session, run)
    return BestTrialResult(
        number=run.trial_number,
        run_id=run.id,
        val_loss_nats=run.val_loss_nats,
        params=run.params,
        cost_flops=run.cost_flops,
        checkpoint=base.checkpoint if base else None,
    )


def _load_targets(session: Session, study_id: str) -> tuple[TargetRun, ...]:
    query = select(Run).where(Run.study_id == study_id, Run.kind == "target").order_by(Run.id)
    runs = session.scalars(query).all()
    curves = _load_curves(session, [run.id for run in runs], MAX_JUDGED_POINTS)
    # A seed is a 64-bit number. People read its place among the seeds of its launch: 0, 1, 2, ...
    seeds = {run.launch: sorted({r.seed for r in runs if r.launch == run.launch}) for run in runs}
    targets = [
        _make_target(run, _join_trunk_curve(run, curves), seeds[run.launch].index(run.seed))
        for run in runs
    ]
    return tuple(sorted(targets, key=lambda t: (t.launch, t.rung, t.branch, t.seed_number, t.arm)))


def _join_trunk_curve(
    run: Run, curves: Mapping[str, tuple[Evaluation, ...]]
) -> tuple[Evaluation, ...]:
    """Return the run's curve; for a branch, after the trunk's curve up to the branch's start."""
    # For example a branch that left its trunk at 500 tokens has the trunk's points at 250 and 500,
    # then points of its own. The trunk's points at 750 and 1000 belong to other branches.
    trunk = curves[run.trunk_id] if run.trunk_id else ()
    return (*(point for point in trunk if point.tokens <= run.trunk_tokens), *curves[run.id])


def _make_target(run: Run, curve: tuple[Evaluation, ...], seed_number: int) -> TargetRun:
    same = ("launch", "rung", "arm", "seed", "state", "diverged", "val_loss_nats", "base_hash")
    more = ("branch", "trunk_id", "trunk_tokens", "tokens", "num_tokens", "cost_flops", "error")
    return TargetRun.model_validate(
        {name: getattr(run, name) for name in (*same, *more)}
        | {
            "run_id": run.id,
            "seed_number": seed_number,
            "budget": run.spec["train"]["tokens_per_param"] if run.branch else None,
            "is_trunk": bool(run.spec.get("branches")),
            "trunk_flops": run.trunk_tokens * run.flops_per_token,
            "curve": curve,
            "data_hash": (run.provenance or {}).get("data_hash"),
        }
    )


# PostgreSQL thins the curves, so that a study of 10 000 evaluations a run sends no more than the
# page draws. `to_end` numbers a run's evaluations from the last (1) to the first (n), and `stride`
# is ceil(n / most). A row stays if (to_end - 1) % stride = 0.
# For example n = 10 and most = 4: stride 3 keeps to_end 1, 4, 7 and 10, the last evaluation always.
def _load_curves(
    session: Session, run_ids: list[str], most: int
) -> defaultdict[str, tuple[Evaluation, ...]]:
    """Return the evaluations of these runs by step: at most `most` of each run, evenly spaced.

    The last evaluation of a run is always there. A run without evaluations has an empty curve.
    """
    to_end = func.row_number().over(
        partition_by=Measurement.run_id, order_by=Measurement.step.desc()
    )
    size = func.count().over(partition_by=Measurement.run_id)
    numbered = (
        select(Measurement.run_id, Measurement.step, Measurement.tokens, Measurement.val_loss_nats)
        .add_columns(Measurement.ema_val_loss_nats, Measurement.swa_val_loss_nats)
        .add_columns(to_end.label("to_end"), ((size + most - 1) // most).label("stride"))
        .where(Measurement.run_id.in_(run_ids), Measurement.val_loss_nats.is_not(None))
        .subquery()
    )
    query = select(numbered).where((numbered.c.to_end - 1) % numbered.c.stride == 0)
    query = query.order_by(numbered.c.run_id, numbered.c.step)
    points: defaultdict[str, list[Evaluation]] = defaultdict(list)
    for row in session.execute(query):
        point = Evaluation.model_validate(row, from_attributes=True)
        points[row.run_id].append(point)
    return defaultdict(tuple, {run_id: tuple(curve) for run_id, curve in points.items()})


def load_report_trials(session: Session, study_id: str) -> tuple[ReportTrial, ...]:
    """Return every trial by number, with curves of the best `MAX_TRIAL_CURVES` trials only.

    The limit bounds the size of the page.
    """
    query = (
        select(Run.id.label("run_id"), Run.trial_number.label("number"), Run.state, Run.diverged)
        .add_columns(Run.params, Run.val_loss_nats, Run.error)
        .add_columns(Run.cost_flops.label("cost_flops"))
        .where(Run.study_id == study_id, Run.kind == "trial")
        .order_by(Run.trial_number)
    )
    rows = session.execute(query).mappings().all()
    # Trials without a loss come last: False sorts before True.
    by_loss = sorted(rows, key=lambda r: (r["val_loss_nats"] is None, r["val_loss_nats"]))
    best = [row["run_id"] for row in by_loss[:MAX_TRIAL_CURVES]]
    curves = _load_curves(session, best, MAX_TRIAL_POINTS)
    return tuple(
        ReportTrial.model_validate({**row, "curve": curves[row["run_id"]]}) for row in rows
    )
