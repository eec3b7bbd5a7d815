"""A worker's report, in one statement: nothing of it stands unless its lease does.

The statement is a transaction of its own. It renews the lease, adds points to the curve, keeps what
the run shows of itself, and gives Optuna the validation losses that its pruner judges by. Written
apart these were eight transactions, most of a report's time.
"""

from dataclasses import dataclass
from typing import Any

from sqlalchemy import text
from sqlalchemy.orm import Session
from starlette.datastructures import State

from service.access.caller import Caller
from service.leases import attempts
from service.optuna_bridge.sampler import Sampler
from service.protocol import Decision, Measurement
from service.specs.stored import UnreadableSpecError, parse_stored


@dataclass(frozen=True, kw_only=True)
class WrittenReport:
    """A report that was written: whose it was, and whether its study's pruner has a say."""

    study_id: str
    attempt: int
    trial_number: int | None
    optuna_name: str
    judged_by: dict[str, Any] | None  # the study's spec; None: nothing to judge


def report(
    state: State, caller: Caller, run_id: str, token: str, points: tuple[Measurement, ...]
) -> Decision:
    """Write a report and say what the worker should do next.

    Raises:
        Problem: 404 for no such run; 409 for a token that another attempt has replaced.
    """
    with state.statements() as session:
        lease_seconds = state.settings.lease_seconds
        heard = write_report(session, caller, run_id, token, points, lease_seconds=lease_seconds)
        if heard is None:
            return attempts.after_end(session, caller, run_id, token)
    state.presence.note_request()
    return "prune" if _is_pruned(state.sampler, heard) else "continue"


def _is_pruned(sampler: Sampler, heard: WrittenReport) -> bool:
    if heard.judged_by is None or heard.trial_number is None:
        return False
    try:
        spec = parse_stored(heard.judged_by)
    except UnreadableSpecError:
        return False  # another version's pruner may say so at a later report
    return sampler.prunes(heard.optuna_name, spec, heard.trial_number)


def write_report(
    session: Session,
    caller: Caller,
    run_id: str,
    token: str,
    points: tuple[Measurement, ...],
    *,
    lease_seconds: float,
) -> WrittenReport | None:
    """Write a report; None when no lease of this token stands.

    A lease that has run out but was not taken by anybody else yet is still good. A step or an
    evaluation that is there already keeps its first report. What the run shows of itself is the
    newest of each number, but a resumed attempt goes over ground that is on record.
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
        -- Not now(), which is when this began: it may have waited for the row.
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
