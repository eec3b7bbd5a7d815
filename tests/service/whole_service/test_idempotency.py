"""A request that is sent again counts once, also while the first is still being served."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from service.client import ServiceError
from tests.by_hand import Worker

TARGETS = {"target": {"width": 64}}


def reused(call):
    with pytest.raises(ServiceError) as refused:
        call()
    assert (refused.value.status, refused.value.type) == (
        409,
        "urn:warmscale:idempotency-key-reused",
    )


def runs_of(answer):
    return [run["id"] for run in answer["items"]]


@pytest.fixture
def grown(api, submit, worker):
    """The path of a study with a trial to grow."""
    study = submit(target=None)
    worker.complete(worker.lease_one())
    return f"/v1/studies/{study['id']}"


def test_the_same_key_starts_the_same_targets_once(api, grown):
    first = api.client.post(f"{grown}/targets", TARGETS, idempotency_key="a")
    again = api.client.post(f"{grown}/targets", TARGETS, idempotency_key="a")
    assert runs_of(again) == runs_of(first)
    reused(
        lambda: api.client.post(
            f"{grown}/targets", TARGETS | {"target": {"width": 96}}, idempotency_key="a"
        )
    )
    other = api.client.post(f"{grown}/targets", TARGETS, idempotency_key="b")
    assert not set(runs_of(other)) & set(runs_of(first))
    unkeyed = [runs_of(api.client.post(f"{grown}/targets", TARGETS)) for _ in range(2)]
    assert unkeyed[0] != unkeyed[1]


def test_targets_are_found_again_though_their_study_has_been_cancelled(api, grown):
    first = api.client.post(f"{grown}/targets", TARGETS, idempotency_key="a")
    api.client.post(f"{grown}/cancel")
    again = api.client.post(f"{grown}/targets", TARGETS, idempotency_key="a")
    assert runs_of(again) == runs_of(first)
    assert {run["state"] for run in again["items"]} == {"cancelled"}


def test_the_same_key_enqueues_the_same_trial_once(api, submit, worker):
    path = f"/v1/studies/{submit()['id']}/trials"
    given = {"params": {"lr": 0.005}}
    first = api.client.post(path, given, idempotency_key="a")
    assert api.client.post(path, given, idempotency_key="a") == first
    reused(lambda: api.client.post(path, {"params": {"lr": 0.006}}, idempotency_key="a"))
    lease = worker.lease_one()
    assert (lease.trial_number, lease.params) == (first["number"], {"lr": 0.005})
    again = api.client.post(path, given, idempotency_key="a")
    assert (again["number"], again["run_id"]) == (first["number"], lease.run_id)
    assert len(api.client.get(path)["items"]) == 1


def test_a_key_is_a_studys_own(api, submit):
    for _ in range(2):
        path = f"/v1/studies/{submit()['id']}/trials"
        trial = api.client.post(path, {"params": {"lr": 0.005}}, idempotency_key="a")
        assert trial["number"] == 0


def test_a_key_sent_eight_times_at_once_counts_once(api, grown, submit):
    study = f"/v1/studies/{submit()['id']}"
    calls = {
        f"{study}/trials": {"params": {"lr": 0.005}},
        f"{grown}/targets": TARGETS,
    }
    for path, body in calls.items():
        with ThreadPoolExecutor(8) as pool:
            sent = [pool.submit(api.client.post, path, body, idempotency_key="k") for _ in range(8)]
            answers = [future.result() for future in sent]
        assert all(answer == answers[0] for answer in answers)
    assert len(api.client.get(f"{study}/trials")["items"]) == 1
    assert len(api.client.get("/v1/runs", kind="target")["items"]) == len(answers[0]["items"])


def test_a_trial_whose_enqueueing_was_cut_off_before_our_commit_is_found_by_its_key(api, submit):
    """Optuna commits in a transaction of its own: a crash may come between the two commits."""
    study = submit()
    number = api.sampler.enqueue_trial(study["name"], {"lr": 0.005}, "k")
    path = f"/v1/studies/{study['id']}/trials"
    trial = api.client.post(path, {"params": {"lr": 0.005}}, idempotency_key="k")
    assert trial["number"] == number
    assert len(api.client.get(path)["items"]) == 1


def test_an_enqueued_batch_that_its_processes_cannot_share_is_refused_by_name(
    api, submit, study_spec
):
    space = study_spec()["search_space"] | {
        "batch_size": {"type": "int", "low": 4, "high": 8, "step": 2}
    }
    study = submit(search_space=space, resources={"trial": {"cpus": 2, "processes": 2}})
    path = f"/v1/studies/{study['id']}/trials"
    api.client.post(path, {"params": {"batch_size": 8}})
    with pytest.raises(ServiceError) as refused:
        api.client.post(path, {"params": {"batch_size": 5}})
    assert refused.value.problem["errors"][0]["path"] == "params.batch_size"
    assert Worker(api.client).lease_one().params["batch_size"] == 8
