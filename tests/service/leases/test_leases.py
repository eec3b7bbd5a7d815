"""Leases: when they are granted, renewed and expired; no run is lost and no trial starts twice."""

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from sqlalchemy import text, update

from service.client import ServiceError, StaleLeaseError
from service.database.tables import Run
from service.leases import queue
from service.leases.queue import LeaseQueue
from service.protocol import Resources
from service.settings import Settings
from service.web.services import find_service
from tests.by_hand import start_trial

# The most that a poll waits. No test needs it, on a slow machine either.
LONG = 60.0


def expire_all(api):
    with api.sessions.begin() as session:
        session.execute(
            update(Run).where(Run.state == "leased").values(lease_expires_at=text("now()"))
        )


def wait_until(condition, seconds=LONG / 2):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def num_waiting(api):
    return len(find_service(api.app, LeaseQueue)._waiting)


def test_trials_are_leased_up_to_parallel(submit, worker):
    submit()
    # `parallel` is 2 in the study that the fixture writes.
    first = worker.lease(8)
    assert [lease.trial_number for lease in first] == [0, 1]
    assert worker.lease(8) == ()
    worker.complete(first[0])
    assert [lease.trial_number for lease in worker.lease(8)] == [2]


def test_a_lease_fits_the_resources_that_are_free(submit, worker):
    submit(resources={"trial": {"cpus": 3}})
    assert worker.lease(4, cpus=2) == ()
    assert len(worker.lease(4, cpus=5)) == 1
    assert len(worker.lease(4, cpus=6)) == 1


def test_a_lease_says_how_many_processes_share_the_run_and_how(submit, worker):
    submit(
        resources={
            "trial": {"cpus": 2, "processes": 2, "strategy": "fsdp"},
            "target": {"gpus": 4.0},
        }
    )
    needs = worker.lease_one().resources
    assert (needs.cpus, needs.num_processes, needs.strategy) == (2, 2, "fsdp")
    assert Resources(gpus=4.0).num_processes == 4
    assert Resources(gpus=0.5).num_processes == 1


def test_a_target_is_leased_with_the_processes_of_targets(api, submit, worker):
    study = submit(hpo={"trials": 1}, resources={"target": {"cpus": 2, "processes": 2}})
    trial = worker.lease_one()
    assert trial.resources.num_processes == 1
    worker.complete(trial)
    targets = worker.lease(8)
    assert {(t.kind, t.resources.num_processes) for t in targets} == {("target", 2)}, study


def test_a_study_that_does_not_fit_does_not_block_the_next(submit, worker):
    submit(resources={"trial": {"cpus": 100}})
    small = submit()
    assert {lease.study_id for lease in worker.lease(4, cpus=4)} == {small["id"]}


def test_sixteen_racing_workers_start_each_trial_once_and_no_more_than_the_budget(
    api, submit, worker
):
    study = submit(hpo={"trials": 24, "parallel": 24, "sampler": "random", "pruner": "none"})

    def lease_all(_):
        taken = []
        while batch := worker.lease(2, wait_seconds=1):
            taken += [lease.trial_number for lease in batch]
        return taken

    with ThreadPoolExecutor(16) as pool:
        numbers = [number for taken in pool.map(lease_all, range(16)) for number in taken]
    assert sorted(numbers) == list(range(24))
    assert api.client.get(f"/v1/studies/{study['id']}")["trials"]["leased"] == 24
    assert len(api.sampler.read_states(study["name"])) == 24


def test_an_expired_run_is_leased_again_with_the_next_attempt(api, submit, worker):
    submit(hpo={"trials": 1, "parallel": 1, "sampler": "random"})
    before = worker.lease_one()
    worker.publish(before, step=5, final=False)
    expire_all(api)
    time.sleep(0.01)
    # This request expires the lease; the run is due again after 1 s.
    assert worker.lease() == ()
    after = worker.lease_one(wait_seconds=LONG)
    assert (after.run_id, after.attempt, after.params) == (before.run_id, 2, before.params)
    assert [ref.uri for ref in after.resume_from] == [f"{before.artifact_uri}/step-00000005"]
    assert after.artifact_uri != before.artifact_uri


def test_a_write_under_a_stale_lease_is_refused_and_changes_nothing(api, submit, worker):
    submit(hpo={"trials": 1, "parallel": 1, "sampler": "random"})
    stale = worker.lease_one()
    expire_all(api)
    worker.lease_one(wait_seconds=LONG)
    run = api.client.get(f"/v1/runs/{stale.run_id}")
    writes = (
        lambda: worker.evaluate(stale, 1, 3.0),
        lambda: worker.publish(stale),
        lambda: worker.finish(stale),
    )
    for write in writes:
        with pytest.raises(StaleLeaseError) as refused:
            write()
        assert refused.value.status == 409
    assert api.client.get(f"/v1/runs/{stale.run_id}") == run
    assert api.client.get(f"/v1/runs/{stale.run_id}/measurements")["items"] == []
    assert api.client.get(f"/v1/runs/{stale.run_id}/checkpoints") == {"items": []}


def test_a_lease_that_ran_out_but_was_taken_by_nobody_is_renewed_by_a_report(api, submit, worker):
    submit()
    lease = worker.lease_one()
    expire_all(api)
    assert worker.evaluate(lease, 1, 3.0) == "continue"
    assert worker.complete(lease) == "succeeded"


def test_every_report_renews_the_lease(api, submit, worker):
    submit()
    lease = worker.lease_one()
    expire_all(api)
    before = now(api)
    assert worker.report(lease) == "continue"
    with api.sessions() as session:
        given = session.get_one(Run, lease.run_id).lease_expires_at
    seconds = timedelta(seconds=find_service(api.app, Settings).lease_seconds)
    assert before + seconds < given < now(api) + seconds


def now(api):
    """The time of the database: leases expire by its clock."""
    with api.sessions() as session:
        return session.scalar(text("SELECT clock_timestamp()"))


def test_attempts_end_at_max_attempts_and_the_run_fails(api, submit, worker):
    study = submit(max_attempts=2, hpo={"trials": 1, "parallel": 1, "sampler": "random"})
    assert worker.finish(worker.lease_one(), "failed", error="boom") == "queued"
    assert worker.finish(worker.lease_one(wait_seconds=LONG), "failed", error="boom") == "failed"
    view = api.client.get(f"/v1/studies/{study['id']}")
    assert (view["state"], view["trials"]["failed"]) == ("failed", 1)
    assert "no trial succeeded" in view["reason"]


def test_a_failure_that_cannot_be_retried_ends_the_run_at_once(submit, worker):
    submit()
    assert (
        worker.finish(worker.lease_one(), "failed", retryable=False, error="bad corpus") == "failed"
    )


def test_a_released_run_is_queued_at_once_and_costs_no_attempt(api, submit, worker):
    submit(max_attempts=1, hpo={"trials": 1, "parallel": 1, "sampler": "random"})
    for _ in range(3):
        assert worker.finish(worker.lease_one(), "released") == "queued"
    assert api.client.get("/v1/runs")["items"][0]["failures"] == 0


def test_finishing_twice_changes_nothing(api, submit, worker):
    submit()
    lease = worker.lease_one()
    worker.publish(lease)
    assert worker.finish(lease, loss=2.0) == "succeeded"
    before = api.client.get(f"/v1/runs/{lease.run_id}")
    assert worker.finish(lease, loss=9.0) == "succeeded"
    assert worker.finish(lease, "failed") == "succeeded"
    assert api.client.get(f"/v1/runs/{lease.run_id}") == before


def test_replaying_a_report_changes_nothing(api, submit, worker):
    submit()
    lease = worker.lease_one()
    point = {"step": 10, "tokens": 2560, "loss_nats": 3.5}
    worker.report(lease, point)
    worker.report(lease, point | {"loss_nats": 9.9})
    items = api.client.get(f"/v1/runs/{lease.run_id}/measurements")["items"]
    assert [(p["step"], p["loss_nats"]) for p in items] == [(10, 3.5)]


def test_a_cancelled_run_hears_it_at_its_next_report(api, submit, worker):
    study = submit()
    lease = worker.lease_one()
    api.client.post(f"/v1/studies/{study['id']}/cancel")
    assert worker.evaluate(lease, 1, 3.0) == "cancel"
    assert api.client.get(f"/v1/runs/{lease.run_id}/measurements")["items"] == []
    assert worker.finish(lease, "released") == "cancelled"


def test_a_paused_study_leases_nothing_until_it_resumes(api, submit, worker):
    study = submit()
    lease = worker.lease_one()
    api.client.post(f"/v1/studies/{study['id']}/pause")
    assert worker.lease(4) == ()
    assert worker.complete(lease) == "succeeded"
    api.client.post(f"/v1/studies/{study['id']}/resume")
    assert len(worker.lease(4)) == 2


def test_a_long_poll_is_answered_by_work_that_comes_and_not_by_its_end(
    api, submit, worker, monkeypatch
):
    monkeypatch.setattr(queue, "_POLL_SECONDS", LONG)
    with ThreadPoolExecutor(1) as pool:
        poll = pool.submit(worker.lease_one, wait_seconds=LONG)
        wait_until(lambda: num_waiting(api) == 1)
        submit()
        assert poll.result(LONG / 2)


def test_waiting_polls_hold_no_connection(api, submit, worker):
    def in_use():
        return sum(engine.pool.checkedout() for engine in (api.engine, api.sampler.engine))

    # 30 polls are three times the connections of the pool.
    with ThreadPoolExecutor(30) as pool:
        polls = [pool.submit(worker.lease, 1, wait_seconds=LONG) for _ in range(30)]
        wait_until(lambda: num_waiting(api) == 30 and in_use() == 0)
        assert api.client.get("/readyz") == {"status": "ready"}
        assert not any(poll.done() for poll in polls)
        submit(hpo={"trials": 30, "parallel": 30, "sampler": "random", "pruner": "none"})
        assert {len(poll.result(LONG / 2)) for poll in polls} == {1}


def test_a_trial_whose_run_was_never_written_is_adopted(api, submit, worker, study_spec):
    from service.studies.schemas import StudySpec

    study = submit()
    spec = StudySpec.model_validate(study["spec"])
    # A process of an older version was killed between Optuna's transaction and ours.
    lost = start_trial(api.sampler, study["name"], spec)
    lease = worker.lease_one()
    assert (lease.trial_number, lease.params) == (lost.number, lost.params)


def test_a_trial_killed_before_its_parameters_were_drawn_is_adopted_whole(api, submit, worker):
    import optuna
    from optuna.storages import RDBStorage

    from service.database.engine import optuna_url

    study = submit()
    # The storage of another process, which is killed before it samples the parameters.
    storage = RDBStorage(optuna_url(api.engine.url), skip_table_creation=True)
    optuna.load_study(study_name=study["name"], storage=storage).ask()
    storage.engine.dispose()
    assert set(worker.lease_one().params) == {"lr"}


def test_a_finished_trial_that_optuna_has_not_heard_of_is_told_at_the_next_lease(
    api, submit, worker
):
    study = submit()
    lease = worker.lease_one()
    worker.complete(lease)
    wait_until(lambda: api.sampler.read_states(study["name"])[0][0] != "RUNNING")
    # As if the process had been killed after it wrote the run and before it told Optuna.
    with api.sessions.begin() as session:
        session.execute(update(Run).values(told=False))
    worker.lease()
    with api.sessions() as session:
        assert session.get(Run, lease.run_id).told


def test_a_checkpoint_outside_its_attempts_place_is_refused(submit, worker, api):
    submit()
    lease = worker.lease_one()
    body = {"step": 1, "tokens": 1, "hash": "0" * 64, "num_bytes": 1}
    for uri in ("file:///etc", f"{lease.artifact_uri}/../other", lease.artifact_uri):
        with pytest.raises(ServiceError, match="publishes below") as refused:
            api.client.request(
                "POST",
                f"/v1/runs/{lease.run_id}/checkpoints",
                body=body | {"uri": uri},
                headers={"Lease-Token": lease.lease_token},
            )
        assert refused.value.status == 422


def test_a_checkpoint_that_was_published_before_it_was_known_to_be_the_last_becomes_final(
    submit, worker, api
):
    submit()
    lease = worker.lease_one()
    worker.publish(lease, step=20, final=False)
    worker.publish(lease, step=20, final=True)
    (kept,) = api.client.get(f"/v1/runs/{lease.run_id}/checkpoints")["items"]
    assert kept["final"]


def test_a_published_checkpoint_keeps_its_hash(submit, worker, api):
    submit()
    lease = worker.lease_one()
    worker.publish(lease, step=20)
    body = {"step": 20, "tokens": 1, "hash": "0" * 64, "num_bytes": 1}
    with pytest.raises(ServiceError) as refused:
        api.client.request(
            "POST",
            f"/v1/runs/{lease.run_id}/checkpoints",
            body=body | {"uri": f"{lease.artifact_uri}/step-00000020"},
            headers={"Lease-Token": lease.lease_token},
        )
    assert (refused.value.status, refused.value.type) == (409, "urn:warmscale:checkpoint-exists")


def test_all_but_the_newest_two_checkpoints_are_superseded(submit, worker, api):
    submit()
    lease = worker.lease_one()
    # The third publish supersedes the first checkpoint, and its worker deletes the files.
    superseded = [worker.publish(lease, step=s, final=False).superseded for s in (5, 10, 15)]
    assert superseded == [(), (), (f"{lease.artifact_uri}/step-00000005",)]
    kept = api.client.get(f"/v1/runs/{lease.run_id}/checkpoints")["items"]
    assert [c["step"] for c in kept] == [15, 10]


def test_last_trials_that_finish_at_once_enqueue_the_targets_once(api, submit, worker):
    # Each of the four finishes may see that all trials have ended: the study's lock lets only the
    # last enqueue. Ten repetitions give races a chance.
    for _ in range(10):
        study = submit(hpo={"trials": 4, "parallel": 4, "sampler": "random", "pruner": "none"})
        leases = worker.lease(4)
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(worker.complete, leases))
        view = api.client.get(f"/v1/studies/{study['id']}")
        assert (view["state"], view["reason"]) == ("active", None)
        assert view["targets"]["queued"] == 4
        api.client.post(f"/v1/studies/{study['id']}/cancel")


def test_who_takes_no_kind_is_granted_nothing(api, submit, worker):
    submit()
    worker.finish(worker.lease_one(), "released")
    assert worker.lease(1, kinds=()) == ()
    assert len(worker.lease(1)) == 1
