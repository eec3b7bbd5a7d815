"""A worker's report of measurements: a single statement writes it, if the lease is valid.

The statement is a transaction of its own. It renews the lease, adds points to the curve, updates
the numbers that the run shows, and gives Optuna the validation losses that its pruner compares.
Written separately these were eight transactions and took most of a report's time.
"""

from dataclasses import dataclass
from typing import Any

from sqlalchemy import text
from sqlalchemy.orm import Session

from service.access.caller import Caller
from service.leases.attempts import decide_after_end
from service.leases.services import LeaseServices
from service.optuna_bridge.sampler import Sampler
from service.protocol import Decision, Measurement
from service.specs.stored import UnreadableSpecError, parse_stored


@dataclass(frozen=True, kw_only=True)
class WrittenReport:
    """A report that was written, and the facts that decide whether its trial is pruned."""

    study_id: str
    attempt: int
    trial_number: int | None
    optuna_name: str
    judged_by: dict[str, Any] | None  # the study's spec; None: the report has nothing to compare


def take_report(
    services: LeaseServices,
    caller: Caller,
    run_id: str,
    token: str,
    points: tuple[Measurement, ...],
) -> Decision:
    """Write a report and return the worker's next step.

    Raises:
        Problem: 404 for an unknown run; 409 for a token that another attempt has replaced.
    """
    with services.statements() as session:
        lease_seconds = services.settings.lease_seconds
        written = write_report(session, caller, run_id, token, points, lease_seconds=lease_seconds)
        if written is None:
            return decide_after_end(session, caller, run_id, token)
    services.presence.note_request()
    return "prune" if _is_pruned(services.sampler, written) else "continue"


def _is_pruned(sampler: Sampler, written: WrittenReport) -> bool:
    if written.judged_by is None or written.trial_number is None:
        return False
    try:
        spec = parse_stored(written.judged_by)
    except UnreadableSpecError:
        return False  # a replica of the spec's version may prune at a later report
    return sampler.should_prune(written.optuna_name, spec, written.trial_number)


def write_report(
    session: Session,
    caller: Caller,
    run_id: str,
    token: str,
    points: tuple[Measurement, ...],
    *,
    lease_seconds: float,
) -> WrittenReport | None:
    """Write a report; return None if no lease has this token.

    A lease that has run out is valid too, unless another worker has leased the run since.
    """
    values = {
        "run_id": run_id,
        "token": token,
        "project": caller.project,
        "lease_seconds": lease_seconds,
        "points": f"[{','.join(point.model_dump_json() for point in points)}]",
    }
    row = session.execute(_WRITE_REPORT, values).mappings().one_or_none()
    return None if row is None else WrittenReport(**row)


# Every part of the statement depends on the UPDATE in `run`: with a stale token it returns no row
# and nothing is written. `place` numbers the points in their order of arrival.
#
# Example: the run shows step 40, loss 2.9 and has a curve up to step 40. The worker resumed at step
# 30 and reports step 35 (loss 3.0) and step 45 (loss 2.8, evaluation 3, val_loss 2.85).
#   run        step 45, loss 2.8, val_loss 2.85: of the points from step 40 on, the newest number
#              of each kind. Step 35 changes nothing that the run shows.
#   curve      45 is added; 35 is not if the curve has it: the first report of a step stays.
#   evaluated  (3, 2.85); `judged` adds it to Optuna's trial unless the trial has ended there.
#   judged_by  the study's spec, since the study has a pruner and the report an evaluation.
_WRITE_REPORT = text("""
WITH point AS MATERIALIZED (
    SELECT * FROM ROWS FROM (json_to_recordset(CAST(:points AS json)) AS (
        step bigint, tokens bigint, loss_nats float8, val_loss_nats float8,
        ema_val_loss_nats float8, swa_val_loss_nats float8, evaluation integer, lr float8,
        grad_norm float8, tokens_per_second float8, train_seconds float8
    )) WITH ORDINALITY AS point (
        step, tokens, loss_nats, val_loss_nats, ema_val_loss_nats, swa_val_loss_nats, evaluation,
        lr, grad_norm, tokens_per_second, train_seconds, place)
), run AS (
    UPDATE warmscale.runs AS run SET
        -- Not now(), the time at which the statement began: it may have waited for the row.
        lease_expires_at = clock_timestamp() + make_interval(secs => :lease_seconds),
        graced = false,
        step = coalesce((
            SELECT max(step) FROM point WHERE step >= run.step), run.step),
        tokens = coalesce((
            SELECT tokens FROM point WHERE step >= run.step
            ORDER BY step DESC, place DESC LIMIT 1), run.tokens),
        loss_nats = coalesce((
            SELECT loss_nats FROM point WHERE step >= run.step AND loss_nats IS NOT NULL
            ORDER BY step DESC, place DESC LIMIT 1), run.loss_nats),
        val_loss_nats = coalesce((
            SELECT val_loss_nats FROM point WHERE step >= run.step AND val_loss_nats IS NOT NULL
            ORDER BY step DESC, place DESC LIMIT 1), run.val_loss_nats),
        tokens_per_second = coalesce((
            SELECT tokens_per_second FROM point
            WHERE step >= run.step AND tokens_per_second IS NOT NULL
            ORDER BY step DESC, place DESC LIMIT 1), run.tokens_per_second)
    FROM warmscale.studies AS study
    WHERE run.id = :run_id AND run.lease_token = :token AND run.state = 'leased'
        AND study.id = run.study_id
        AND (CAST(:project AS text) IS NULL OR study.project = :project)
    RETURNING run.id, run.study_id, run.attempt, run.trial_number, study.spec, study.optuna_name
), curve AS (
    INSERT INTO warmscale.measurements (
        run_id, attempt, step, tokens, loss_nats, val_loss_nats, ema_val_loss_nats,
        swa_val_loss_nats, evaluation, lr, grad_norm, tokens_per_second, train_seconds)
    SELECT run.id, run.attempt, step, tokens, loss_nats, val_loss_nats, ema_val_loss_nats,
        swa_val_loss_nats, evaluation, lr, grad_norm, tokens_per_second, train_seconds
    FROM run CROSS JOIN point ORDER BY place
    ON CONFLICT DO NOTHING
), evaluated AS (
    SELECT evaluation, val_loss_nats FROM point
    WHERE evaluation IS NOT NULL AND val_loss_nats IS NOT NULL ORDER BY place
), judged AS (
    INSERT INTO optuna.trial_intermediate_values (
        trial_id, step, intermediate_value, intermediate_value_type)
    SELECT trial.trial_id, evaluation, val_loss_nats, 'FINITE'
    FROM run
    JOIN optuna.studies AS study ON study.study_name = run.optuna_name
    JOIN optuna.trials AS trial
        ON trial.study_id = study.study_id AND trial.number = run.trial_number
    CROSS JOIN evaluated
    WHERE trial.state = 'RUNNING'
    ON CONFLICT DO NOTHING
)
SELECT study_id, attempt, trial_number, optuna_name,
    CASE WHEN spec #>> '{hpo,pruner}' <> 'none' AND EXISTS (SELECT FROM evaluated)
        THEN spec END AS judged_by
FROM run
""")
