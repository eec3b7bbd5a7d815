"""Finished trials, inserted directly into the tables: `add_trials` of Optuna adds 65 a second."""

from typing import TYPE_CHECKING, Any

from optuna.distributions import FloatDistribution, distribution_to_json
from throughput.workload import REPORTS, SPACE

if TYPE_CHECKING:
    from throughput.stack import Stack

# A number in [0, 1) for each dimension, from a hash of the trial's number; any hash would do.
_DRAWN = """
    CREATE TEMPORARY TABLE drawn AS
    SELECT n, k, name, json, u,
           CASE WHEN log THEN low * power(high / low, u) ELSE low + u * (high - low) END AS value
    FROM (SELECT n, k, name, json, low, high, log,
                 (hashint8(n * 5 + k)::bigint + 2147483648) / 4294967296.0::float8 AS u
          FROM generate_series(%(first)s::bigint, %(last)s::bigint) n,
               unnest(%(names)s::text[], %(jsons)s::text[], %(lows)s::float8[],
                      %(highs)s::float8[], %(logs)s::bool[])
                   WITH ORDINALITY AS space(name, json, low, high, log, k)) AS units
"""

_BOWL = """
    CREATE TEMPORARY TABLE bowl AS
    SELECT n, 2.0 + sum(power(u - 0.3, 2)) AS loss, jsonb_object_agg(name, value) AS params
    FROM drawn GROUP BY n
"""

_TRIALS = """
    WITH trial AS (
        INSERT INTO trials (number, study_id, state, datetime_start, datetime_complete)
        SELECT n, study_id, 'COMPLETE', now() AT TIME ZONE 'UTC', now() AT TIME ZONE 'UTC'
        FROM bowl, studies WHERE study_name = %(study)s ORDER BY n RETURNING trial_id, number),
    params AS (
        INSERT INTO trial_params (trial_id, param_name, param_value, distribution_json)
        SELECT trial_id, name, value, json FROM drawn JOIN trial ON number = n
        ORDER BY trial_id, k),
    points AS (
        INSERT INTO trial_intermediate_values
            (trial_id, step, intermediate_value, intermediate_value_type)
        SELECT trial_id, step, loss + 1.0 / step, 'FINITE'
        FROM bowl JOIN trial ON number = n, generate_series(1, %(reports)s) step)
    INSERT INTO trial_values (trial_id, objective, value, value_type)
    SELECT trial_id, 0, loss, 'FINITE' FROM bowl JOIN trial ON number = n
"""

# Columns that are not named here are copied from the template, a trial that ran through the API.
_RUNS = """
    WITH run AS (
        INSERT INTO warmscale.runs
        SELECT (jsonb_populate_record(template, jsonb_build_object(
            'id', 'run_' || encode(sha256((template.id || n)::bytea), 'hex'),
            'trial_number', n, 'params', bowl.params, 'val_loss_nats', loss))).*
        FROM warmscale.runs template, bowl WHERE template.id = %(template)s RETURNING id),
    points AS (
        INSERT INTO warmscale.measurements
        SELECT (jsonb_populate_record(point, jsonb_build_object('run_id', run.id))).*
        FROM warmscale.measurements point, run WHERE point.run_id = %(template)s)
    INSERT INTO warmscale.events (study_id, run_id, type, attempt, payload)
    SELECT event.study_id, run.id, event.type, event.attempt, event.payload
    FROM warmscale.events event, run WHERE event.run_id = %(template)s
"""


def fill_trials(
    running: "Stack", side: str, study: str, last: int, template: str | None = None
) -> None:
    """Insert finished trials 1 to `last`; with a template run, insert the service's runs too."""
    values = {
        "first": 1 if template else 0,
        "last": last,
        "study": study,
        "template": template,
        "reports": REPORTS,
        "names": list(SPACE),
        "jsons": [_format_distribution(dimension) for dimension in SPACE.values()],
        "lows": [d["low"] for d in SPACE.values()],
        "highs": [d["high"] for d in SPACE.values()],
        "logs": [bool(d.get("log")) for d in SPACE.values()],
    }
    # Trial 0 of the service is the template, so its rows begin at 1.
    with running.connect(side) as connection:
        for statement in (_DRAWN, _BOWL, _TRIALS):
            connection.execute(statement, values)
        if template is not None:
            connection.execute(_RUNS, values)
        connection.execute("ANALYZE")


def _format_distribution(dimension: dict[str, Any]) -> str:
    low, high = dimension["low"], dimension["high"]
    return distribution_to_json(FloatDistribution(low, high, log=dimension.get("log", False)))
