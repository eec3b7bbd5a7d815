"""With ten thousand trials and twenty thousand measurements every answer has a bounded size."""

import json
import time

import httpx
import pytest
from sqlalchemy import text

from tests.by_hand import Worker

# The check of the invariants after every test would read all rows each time.
pytestmark = pytest.mark.tampers
NUM_TRIALS = 10_000
NUM_POINTS = 20_000
# No benchmark (docs/log.md has those): the limit finds requests that hang.
MOST_SECONDS = 60
SPACE = {"lr": {"type": "float", "low": 1e-3, "high": 3e-2, "log": True}}


@pytest.fixture(scope="module")
def api(shared_api):
    return shared_api


# Copies trial 0 in all tables; each copy has a loss and a parameter of its own.
COPIES = """
CREATE TEMPORARY TABLE made AS
SELECT n, 2 + (hashint8(n)::bigint + 2147483648) / 4294967296.0::float8 AS loss,
    0.001 + 0.00001 * mod(n, 2000) AS lr
FROM generate_series(1, {last}) n;
WITH trial AS (
    INSERT INTO optuna.trials (number, study_id, state, datetime_start, datetime_complete)
    SELECT n, study_id, 'COMPLETE', datetime_start, datetime_complete
    FROM made, optuna.trials JOIN optuna.studies USING (study_id)
    WHERE study_name = '{study}' AND number = 0 ORDER BY n RETURNING trial_id, number
), params AS (
    INSERT INTO optuna.trial_params (trial_id, param_name, param_value, distribution_json)
    SELECT trial.trial_id, 'lr', lr, distribution_json
    FROM trial JOIN made ON number = n, optuna.trial_params old
    WHERE old.trial_id = (SELECT trial_id FROM optuna.trials JOIN optuna.studies USING (study_id)
        WHERE study_name = '{study}' AND number = 0)
)
INSERT INTO optuna.trial_values (trial_id, objective, value, value_type)
SELECT trial_id, 0, loss, 'FINITE' FROM trial JOIN made ON number = n;
WITH run AS (
    INSERT INTO warmscale.runs
    SELECT (jsonb_populate_record(old, jsonb_build_object('id', 'run_' || md5(old.id || n),
        'trial_number', n, 'lease_token', old.lease_token || n,
        'params', jsonb_build_object('lr', lr), 'val_loss_nats', loss,
        'created_at', old.created_at + n * interval '1 ms'))).*
    FROM made, warmscale.runs old WHERE old.id = '{run}' RETURNING id, val_loss_nats
), points AS (
    INSERT INTO warmscale.measurements
    SELECT (jsonb_populate_record(old, jsonb_build_object('run_id', run.id))).*
    FROM run, warmscale.measurements old WHERE old.run_id = '{run}'
)
INSERT INTO warmscale.events (study_id, run_id, type, attempt, payload)
SELECT old.study_id, run.id, old.type, old.attempt,
    CASE WHEN old.payload ? 'val_loss_nats'
    THEN old.payload || jsonb_build_object('val_loss_nats', run.val_loss_nats)
    ELSE old.payload END
FROM run, warmscale.events old WHERE old.run_id = '{run}'
"""


@pytest.fixture(scope="module")
def large(api, tmp_path_factory):
    """A study without a target, of ten thousand finished trials."""
    corpus = tmp_path_factory.mktemp("large")
    for i in range(40):
        (corpus / f"{i}.txt").write_text(f"document {i} says {i * i} and {i**3}\n" * 40)
    spec = {
        "name": "large",
        "data": {"source": str(corpus), "context": 32},
        "proxy": {"width": 32, "depth": 1, "head_dim": 16},
        "train": {"batch_size": 8, "num_tokens": 8 * 32 * 20, "evaluations": 4},
        "search_space": SPACE,
        "hpo": {"trials": NUM_TRIALS + 1, "parallel": 2, "sampler": "tpe", "pruner": "none"},
    }
    study, worker = api.client.post("/v1/studies", spec), Worker(api.client)
    lease = worker.lease_one(study="large")
    worker.evaluate(lease, 4, 3.0)
    worker.finish(lease, loss=3.0)
    copies = COPIES.format(last=NUM_TRIALS, study=study["id"], run=lease.run_id)
    with api.engine.begin() as connection:
        name = connection.execute(text("SELECT optuna_name FROM warmscale.studies")).scalar_one()
        connection.exec_driver_sql(copies.replace(f"'{study['id']}'", f"'{name}'"))
    with api.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("ANALYZE")
    return study


def answer(api, path, **params):
    began = time.monotonic()
    response = httpx.get(
        f"{api.url}{path}",
        params=params,
        headers={"Authorization": f"Bearer {api.key}"},
        timeout=MOST_SECONDS,
    )
    took = time.monotonic() - began
    print(f"{path} {params} {len(response.content)} bytes, {took:.2f} s")  # noqa: T201
    assert response.status_code == 200, response.text[:500]
    return response


def test_pages_of_trials_have_every_trial_once_in_order(api, large):
    path = f"/v1/studies/{large['id']}/trials"
    found = api.client.list_items(path, limit=1000)
    assert [trial["number"] for trial in found] == list(range(NUM_TRIALS + 1))
    assert len(answer(api, path).json()["items"]) == 500
    assert (
        answer(api, path, cursor=answer(api, path).json()["next_cursor"]).json()["items"][0][
            "number"
        ]
        == 500
    )


@pytest.mark.parametrize(
    ("path", "most_bytes"),
    [
        ("", 20_000),
        ("/trials", 300_000),
        ("/results", 20_000),
        ("/report", 8_000_000),  # Plotly itself has 5 MB
        ("/importance", 1000),
    ],
)
def test_what_is_read_of_a_large_study_is_of_a_size_to_be_read(api, large, path, most_bytes):
    assert len(answer(api, f"/v1/studies/{large['id']}{path}").content) < most_bytes


def test_lists_and_metrics_do_not_grow_with_a_study(api, large):
    assert len(answer(api, "/v1/studies").content) < 20_000
    assert len(answer(api, "/v1/runs", study=large["id"]).content) < 500_000
    page = answer(api, "/metrics").text
    # The histogram of request times covers this process, with the tests before.
    of_data = [line for line in page.splitlines() if not line.startswith("warmscale_request_")]
    assert 20 < len(of_data) < 400
    assert large["id"] not in page


def test_the_report_says_what_it_leaves_out_and_draws_the_best(api, large):
    page = answer(api, f"/v1/studies/{large['id']}/report").text
    assert f"The best 500 of {NUM_TRIALS + 1} trials. The plots show these and" in page
    best = answer(api, f"/v1/studies/{large['id']}").json()["best_trial"]["number"]
    assert f"u003cb>trial {best}\\u003c/b>" in page


SAMPLERS = ("tpe", "random", "cmaes", "gp", "qmc", "grid")


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("pruner", ["hyperband", "successive_halving", "median", "none"])
def test_a_budget_of_ten_thousand_trials_is_taken(api, study_spec, sampler, pruner):
    lr = SPACE["lr"]
    if sampler == "grid":
        lr = {"type": "int", "low": 1, "high": NUM_TRIALS}
    hpo = {"trials": NUM_TRIALS, "sampler": sampler, "pruner": pruner}
    study = api.client.post("/v1/studies", study_spec(search_space={"lr": lr}, hpo=hpo))
    assert study["trials_budget"] == NUM_TRIALS
    api.client.post(f"/v1/studies/{study['id']}/cancel")


@pytest.fixture
def long_run(api, submit, worker):
    """A leased run with many measurements, written in batches by hand and by SQL."""
    study = submit(target=None)
    lease = worker.lease_one(study=study["id"])
    for first in range(1, 5001, 1000):
        worker.report(lease, *({"step": i, "tokens": i} for i in range(first, first + 1000)))
    statement = text(
        "INSERT INTO warmscale.measurements (run_id, attempt, step, tokens, val_loss_nats) "
        "SELECT :run, 1, n, n, 3 + 1.0 / n FROM generate_series(5001, :last) n"
    )
    with api.engine.begin() as connection:
        connection.execute(statement, {"run": lease.run_id, "last": NUM_POINTS})
    yield study, lease
    api.client.post(f"/v1/studies/{study['id']}/cancel")


def test_pages_of_measurements_have_every_step_once_in_order(api, long_run):
    _, lease = long_run
    path = f"/v1/runs/{lease.run_id}/measurements"
    assert len(answer(api, path).json()["items"]) == 1000
    found = api.client.list_items(path, limit=5000)
    assert [point["step"] for point in found] == list(range(1, NUM_POINTS + 1))


def test_a_report_draws_a_long_curve_by_few_points_with_its_end(api, long_run, worker):
    study, lease = long_run
    worker.finish(lease, loss=3.0)
    page = answer(api, f"/v1/studies/{study['id']}/report").text
    data = page.split('<script id="figures" type="application/json">')[1].split("</script>")[0]
    (curve,) = json.loads(data)["learning"]["data"]
    assert len(curve["x"]) <= 200
    assert curve["x"][-1] == NUM_POINTS


@pytest.mark.parametrize(
    "path", ["/v1/studies/large/trials", "/v1/runs/{run}/measurements"], ids=["trials", "points"]
)
@pytest.mark.parametrize(
    "query",
    [
        "cursor=x",
        "cursor=",
        "cursor=YWZ0ZXIgLTE=",  # after -1
        "cursor=YWZ0ZXIgMWUz",  # after 1e3
        "cursor=MjAyNi0wMS0wMQpydW5fMQ==",  # of another list
        "cursor=" + "9" * 4000,
        "cursor=%00",
        "limit=0",
        "limit=10000",
        "limit=1e3",
    ],
)
def test_a_page_that_is_none_is_refused_by_its_field(api, large, path, query):
    run = api.client.get("/v1/runs", study=large["id"], limit=1)["items"][0]["id"]
    url = f"{api.url}{path.format(run=run)}?{query}"
    response = httpx.get(url, headers={"Authorization": f"Bearer {api.key}"})
    assert response.status_code == 422
    assert response.json()["errors"][0]["path"].endswith(query.split("=")[0])
