"""Faults by which users of other HPO tools report losing trials; each is a law here.

Further tests of this kind: a crashed trial goes on from its checkpoint (optuna #6283), in
`test_leases.py` and in `tests/workers/attempt/test_resume.py`; many workers at once never get "has
already finished and can not be updated" (optuna #5582), in `test_replicas.py`.
"""

import pytest
from sqlalchemy import create_engine, text, update

from service.database.tables import Run
from tests.by_hand import Worker, forget_presence
from tests.conftest import find_violations, serve_api

ONE = {"trials": 1, "parallel": 1, "sampler": "random", "pruner": "none"}


def states_in_optuna(api, study):
    return {n: state for n, (state, _) in api.sampler.read_states(study["name"]).items()}


def test_a_killed_workers_trial_does_not_stay_running_in_optuna_for_ever(api, submit, worker):
    """Optuna #3293: no heartbeat covers ask-and-tell, and a zombie biases the sampler."""
    study = submit(hpo=ONE, max_attempts=2, target=None)
    for _ in range(2):
        assert worker.lease_one(wait_seconds=5)
        # The worker was killed: it reports nothing more, and its lease expires.
        with api.sessions.begin() as session:
            session.execute(update(Run).values(lease_expires_at=text("now() - interval '1 s'")))
        assert worker.lease(1) == ()
    assert states_in_optuna(api, study) == {0: "FAIL"}
    assert api.client.get(f"/v1/studies/{study['id']}")["state"] == "failed"


def test_a_trial_whose_worker_reports_is_never_failed_for_its_age(api, submit, worker):
    """Optuna #4234, #5470: stale-trial detection fails live trials that report slowly."""
    study = submit(hpo=ONE)
    lease = worker.lease_one()
    for evaluation in (1, 2, 3):
        with api.sessions.begin() as session:
            old = "interval '1 day'"
            session.execute(
                text(f"UPDATE optuna.trials SET datetime_start = datetime_start - {old}")
            )
            session.execute(text(f"UPDATE warmscale.runs SET started_at = started_at - {old}"))
        forget_presence(api)
        assert worker.lease(4) == ()
        assert worker.evaluate(lease, evaluation, 3.0) == "continue"
        assert states_in_optuna(api, study) == {0: "RUNNING"}
    assert worker.complete(lease) == "succeeded"
    assert states_in_optuna(api, study) == {0: "COMPLETE"}


def test_fifty_studies_need_no_more_connections_than_one(
    settings, database_url, study_spec, worker_of
):
    """Optuna #1115, #1347: every study object opened connections of its own."""
    watching = create_engine(database_url)
    # On a slow machine fifty leases take longer than the 5 s of a lease.
    few = settings.model_copy(update={"pool_size": 2, "lease_seconds": 300.0})
    with serve_api(few, database_url) as api:
        for _ in range(50):
            api.client.post("/v1/studies", study_spec(hpo=ONE, target=None))
        leases = [lease for _ in range(50) for lease in worker_of(api).lease(50)]
        assert len({lease.study_id for lease in leases}) == 50
        for lease in leases:
            worker_of(api).evaluate(lease, 1, 2.0)
        with watching.connect() as connection:
            used = "SELECT count(*) - 1 FROM pg_stat_activity WHERE datname = current_database()"
            # The service's pool, twice as many for Optuna, and the listener.
            assert 0 < connection.scalar(text(used)) <= 3 * 2 + 1
    watching.dispose()


@pytest.fixture
def worker_of():
    return lambda api: Worker(api.client)


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_a_restarted_service_goes_on_with_the_same_search_and_loses_no_queued_work(
    settings, database_url, study_spec, worker_of, sampler
):
    """Ray #30861: a restored search began anew. Ray #7989: queued trials died with the driver."""
    hpo = {"trials": 8, "parallel": 2, "sampler": sampler, "pruner": "none"}
    drawn, queued = [], []
    with serve_api(settings, database_url) as api:
        study = api.client.post("/v1/studies", study_spec(hpo=hpo, target=None))
        path = f"/v1/studies/{study['id']}"
        for loss in (3.0, 2.0, 1.0):
            (lease,) = worker_of(api).lease(1)
            drawn.append(lease)
            worker_of(api).complete(lease, loss)
        under_way = worker_of(api).lease_one()
        given = api.client.post(f"{path}/trials", {"params": {"lr": 0.0123}})
        queued = api.client.post(f"{path}/targets", {"target": {"width": 64}})["items"]
    with serve_api(settings, database_url) as api:
        worker = worker_of(api)
        assert worker.report(under_way) == "continue"
        worker.complete(under_way)
        found = {lease.run_id for lease in worker.lease(8, kinds=("target",))}
        assert found == {run["id"] for run in queued}
        after = []
        while leases := worker.lease(2, kinds=("trial",)):
            for lease in leases:
                after.append(lease)
                worker.complete(lease)
        numbers = [lease.trial_number for lease in (*drawn, under_way, *after)]
        assert sorted(numbers) == list(range(8))
        assert {lease.params["lr"] for lease in after if lease.trial_number == given["number"]} == {
            0.0123
        }
        assert len({lease.params["lr"] for lease in (*drawn, under_way, *after)}) == 8
        assert api.client.get(path)["state"] == "completed"
        assert find_violations(api.engine) == ()
