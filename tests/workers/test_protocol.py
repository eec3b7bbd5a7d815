"""The worker half of the protocol: every law holds for the API and for the fake service."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from service.client import Client, ServiceError, StaleLeaseError
from service.lifecycle import state_after_attempt
from service.protocol import (
    LEASE_TOKEN_HEADER,
    CheckpointReply,
    FinishReply,
    LeaseReply,
    ReportReply,
)
from tests.by_hand import Worker
from tests.workers.services import Api, Fake

WRITES = {
    "measurements": {"measurements": [{"step": 5, "tokens": 1280, "loss_nats": 1.0}]},
    "checkpoints": {"step": 5, "tokens": 1280, "uri": "", "hash": "0" * 64, "num_bytes": 1},
    "finish": {"outcome": "succeeded", "val_loss_nats": 1.0},
}
PROMPT_SECONDS = 4.5  # shorter than the interval of 5 s at which the service polls
NO_MESSAGES = (b"", b"{", b"[]", b"null", b'{"colour": "red"}')


@pytest.fixture(params=["api", "fake"])
def service(request):
    get = request.getfixturevalue
    if request.param == "api":
        return Api(get("api"), get("study_spec"))
    return Fake(get("fake"), get("client"), get("make_spec")())


@pytest.fixture
def worker(service):
    return Worker(service.client)


@pytest.fixture
def post(service):
    """Send any POST request, with a valid key by default."""
    with httpx.Client(base_url=service.url) as http:

        def post(path, body, *, key=service.key, token=None):
            content = {"content": body} if isinstance(body, bytes) else {"json": body}
            headers = {"Content-Type": "application/json"}
            headers |= {} if key is None else {"Authorization": f"Bearer {key}"}
            headers |= {} if token is None else {LEASE_TOKEN_HEADER: token}
            return http.post(path, **content, headers=headers)

        yield post


def list_writes(lease):
    """Return path and valid body of each write under a lease."""
    place = {"uri": f"{lease.artifact_uri}/step-00000005"}
    for name, body in WRITES.items():
        yield f"/v1/runs/{lease.run_id}/{name}", body | (place if "uri" in body else {})


def read_problem(response):
    """Return status and type of an error response (a problem of RFC 9457)."""
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["status"] == response.status_code
    return response.status_code, response.json()["type"].removeprefix("urn:warmscale:")


# Leasing


def test_leases_fit_the_resources_that_are_offered_together(service, worker):
    service.offer(2, cpus=3)
    assert worker.lease(8, cpus=2) == ()
    assert len(worker.lease(8, cpus=5)) == 1
    assert len(worker.lease(8, cpus=5)) == 1


def test_gpus_are_shared_in_fractions(service, worker):
    service.offer(3, gpus=0.5)
    assert worker.lease(8) == ()
    assert [lease.resources.gpus for lease in worker.lease(8, gpus=1.0)] == [0.5, 0.5]


def test_no_more_than_max_runs_are_leased(service, worker):
    service.offer(3)
    assert [len(worker.lease(2)) for _ in range(3)] == [2, 1, 0]


def test_what_does_not_fit_keeps_nothing_waiting_behind_it(service, worker):
    service.offer(cpus=100)
    small = service.offer()
    assert [lease.study_name for lease in worker.lease(8)] == [small]


def test_runs_are_leased_by_study_and_by_kind(service, worker):
    first, second = service.offer(), service.offer()
    with pytest.raises(ServiceError, match="404"):
        worker.lease(8, study="another")
    assert worker.lease(8, kinds=("target",)) == ()
    (lease,) = worker.lease(8, study=second, kinds=("trial",))
    assert (lease.study_name, lease.kind) == (second, "trial")
    (lease,) = worker.lease(8)
    assert lease.study_name == first


def test_a_first_lease_starts_from_nothing(service, worker):
    service.offer(2)
    first, other = worker.lease(2)
    assert (first.attempt, first.resume_from, first.reported_step) == (1, (), 0)
    for name in ("run_id", "lease_token", "artifact_uri", "trial_number"):
        assert getattr(first, name) != getattr(other, name)


def test_where_nothing_fits_the_answer_is_empty_after_wait_seconds(service, worker):
    service.offer(cpus=100)
    start = time.monotonic()
    assert worker.lease(wait_seconds=0.5) == ()
    assert 0.5 <= time.monotonic() - start < PROMPT_SECONDS


def test_a_long_poll_answers_when_work_arrives(service, worker):
    answers = []
    thread = threading.Thread(target=lambda: answers.append(worker.lease(wait_seconds=20)))
    thread.start()
    time.sleep(0.3)
    start = time.monotonic()
    service.offer()
    thread.join()
    assert len(answers[0]) == 1
    assert time.monotonic() - start < PROMPT_SECONDS


def test_eight_threads_get_each_run_once(service, worker):
    service.offer(16)

    def lease_all(_):
        leased = []
        while leases := worker.lease(2, wait_seconds=0.5):
            leased += [lease.run_id for lease in leases]
        return leased

    with ThreadPoolExecutor(8) as pool:
        ids = [run_id for leased in pool.map(lease_all, range(8)) for run_id in leased]
    assert len(ids) == len(set(ids)) == 16


# Reporting


def test_a_report_is_answered_with_continue(service, worker):
    service.offer()
    lease = worker.lease_one()
    assert worker.report(lease, {"step": 5, "tokens": 1280, "loss_nats": 3.0}) == "continue"
    assert worker.evaluate(lease, evaluation=2, loss=2.5) == "continue"
    assert service.standing(lease).losses == {5: 3.0, 10: None}


def test_an_empty_report_changes_nothing(service, worker):
    service.offer()
    lease = worker.lease_one()
    before = service.standing(lease)
    assert worker.report(lease) == "continue"
    assert service.standing(lease) == before


def test_of_each_step_the_first_report_stands(service, worker):
    service.offer()
    lease = worker.lease_one()
    point = {"step": 5, "tokens": 1280, "loss_nats": 3.0}
    worker.report(lease, point)
    worker.report(lease, point | {"loss_nats": 9.0})
    assert service.standing(lease).losses == {5: 3.0}


def test_to_prune_is_decided_with_an_evaluation_and_with_nothing_else(service, worker):
    service.offer_a_bad_one()
    lease = worker.lease_one()
    assert worker.report(lease, {"step": 3, "tokens": 768, "loss_nats": 9.0}) == "continue"
    assert worker.evaluate(lease, evaluation=1, loss=9.0) == "prune"
    assert worker.report(lease) == "continue"
    assert worker.publish(lease, final=False).decision == "continue"
    assert worker.finish(lease, "pruned", loss=9.0) == "pruned"


def test_a_cancelled_run_hears_it_whatever_it_writes_and_nothing_is_written(service, worker):
    service.offer()
    lease = worker.lease_one()
    service.cancel(lease)
    before = service.standing(lease)
    assert worker.evaluate(lease, evaluation=1, loss=3.0) == "cancel"
    assert worker.report(lease) == "cancel"
    assert worker.publish(lease).decision == "cancel"
    assert worker.finish(lease) == "cancelled"
    assert service.standing(lease) == before
    assert before.state == "cancelled"


# Stale leases


def lease_again(service, worker, lease):
    worker.finish(lease, "released")
    assert worker.lease_one().run_id == lease.run_id


STALE = {
    "given back": lambda service, worker, lease: worker.finish(lease, "released"),
    "failed": lambda service, worker, lease: worker.finish(lease, "failed"),
    "taken by another": lease_again,
}


@pytest.mark.parametrize("end", STALE.values(), ids=STALE)
def test_a_stale_token_is_refused_and_writes_nothing(service, worker, post, end):
    service.offer()
    lease = worker.lease_one()
    end(service, worker, lease)
    before = service.standing(lease)
    for path, body in list_writes(lease):
        answer = post(path, body, token=lease.lease_token)
        assert read_problem(answer) == (409, "stale-lease"), path
    assert service.standing(lease) == before
    with pytest.raises(StaleLeaseError):
        worker.report(lease)


def test_a_token_that_never_was_is_refused_and_writes_nothing(service, worker, post):
    service.offer()
    lease = worker.lease_one()
    before = service.standing(lease)
    for path, body in list_writes(lease):
        assert read_problem(post(path, body, token="x")) == (409, "stale-lease"), path  # noqa: S106
    assert service.standing(lease) == before
    assert worker.report(lease) == "continue"


def test_a_finished_run_takes_no_more_of_a_curve_and_no_checkpoint(service, worker):
    service.offer()
    lease = worker.lease_one()
    worker.complete(lease)
    before = service.standing(lease)
    with pytest.raises(StaleLeaseError):
        worker.evaluate(lease, evaluation=1, loss=3.0)
    with pytest.raises(StaleLeaseError):
        worker.publish(lease, step=5)
    assert service.standing(lease) == before


def test_an_expired_lease_is_lost_to_the_next_attempt(service, worker):
    service.offer()
    lease = worker.lease_one()
    service.expire()
    assert worker.lease() == ()  # expired by now, and due after the delay of a failure
    again = worker.lease_one(wait_seconds=5)
    assert (again.run_id, again.attempt) == (lease.run_id, 2)
    assert service.standing(lease).failures == 1
    with pytest.raises(StaleLeaseError):
        worker.report(lease)
    assert worker.report(again) == "continue"


def test_a_report_renews_a_lease_that_ran_out_and_was_taken_by_nobody(service, worker):
    service.offer()
    lease = worker.lease_one()
    service.expire()
    assert worker.report(lease) == "continue"
    assert worker.lease() == ()
    assert worker.complete(lease) == "succeeded"


# Checkpoints


def test_publishing_the_same_again_changes_nothing_but_that_it_may_become_final(service, worker):
    service.offer()
    lease = worker.lease_one()
    worker.publish(lease, step=20, final=False)
    assert service.standing(lease).checkpoints == [(20, False)]
    worker.publish(lease, step=20, final=False)
    assert service.standing(lease).checkpoints == [(20, False)]
    worker.publish(lease, step=20, final=True)
    worker.publish(lease, step=20, final=False)
    assert service.standing(lease).checkpoints == [(20, True)]


def test_another_hash_at_the_same_step_is_refused(service, worker):
    service.offer()
    lease = worker.lease_one()
    worker.publish(lease, step=20, final=False)
    before = service.standing(lease)
    with pytest.raises(ServiceError) as refused:
        worker.publish(lease, step=20, hash="0" * 64)
    assert (refused.value.status, refused.value.type) == (409, "urn:warmscale:checkpoint-exists")
    assert service.standing(lease) == before
    assert worker.report(lease) == "continue"


def test_all_but_the_newest_two_that_are_not_final_are_superseded(service, worker):
    service.offer()
    lease = worker.lease_one()
    gone = [worker.publish(lease, step=step, final=False).superseded for step in (5, 10, 15, 20)]
    places = [f"{lease.artifact_uri}/step-{step:08d}" for step in (5, 10)]
    assert gone == [(), (), (places[0],), (places[1],)]
    assert service.standing(lease).checkpoints == [(20, False), (15, False)]


def test_a_final_checkpoint_is_never_superseded(service, worker):
    service.offer()
    lease = worker.lease_one()
    gone = [worker.publish(lease, step=s, final=s == 5).superseded for s in (5, 10, 15, 20)]
    assert gone == [(), (), (), (f"{lease.artifact_uri}/step-00000010",)]
    assert service.standing(lease).checkpoints == [(20, False), (15, False), (5, True)]


def test_publishing_again_names_again_what_it_superseded(service, worker):
    service.offer()
    lease = worker.lease_one()
    gone = [worker.publish(lease, step=step, final=False).superseded for step in (5, 10, 15, 15)]
    assert gone[2] == gone[3] == (f"{lease.artifact_uri}/step-00000005",)


def test_an_attempt_that_had_to_start_again_keeps_its_own_checkpoints(service, worker):
    service.offer()
    first = worker.lease_one()
    for step in (15, 20):
        worker.publish(first, step=step, final=False)
    worker.finish(first, "released")
    second = worker.lease_one()
    older = [(ref.uri,) for ref in reversed(second.resume_from)]
    assert worker.publish(second, step=5, final=False).superseded == older[0]
    assert service.standing(second).checkpoints == [(20, False), (5, False)]
    assert worker.publish(second, step=10, final=False).superseded == older[1]
    assert service.standing(second).checkpoints == [(10, False), (5, False)]


def test_a_checkpoint_outside_its_attempts_place_is_refused(service, worker):
    service.offer()
    lease = worker.lease_one()
    for uri in ("file:///etc", f"{lease.artifact_uri}/../other", lease.artifact_uri):
        with pytest.raises(ServiceError) as refused:
            worker.publish(lease, uri=uri)
        assert refused.value.status == 422
    assert service.standing(lease).checkpoints == []


# Ends


# outcome, retryable, max_attempts
ENDS = [
    ("succeeded", True, 3),
    ("pruned", True, 3),
    ("diverged", True, 3),
    ("failed", True, 2),
    ("failed", True, 1),
    ("failed", False, 3),
    ("released", True, 1),
]


@pytest.mark.parametrize(("outcome", "retryable", "max_attempts"), ENDS)
def test_an_end_leads_to_the_state_of_the_table(service, worker, outcome, retryable, max_attempts):
    service.offer(max_attempts=max_attempts)
    lease = worker.lease_one()
    worker.publish(lease)
    failures = int(outcome == "failed")
    state = state_after_attempt(
        outcome, retryable=retryable, failures=failures, max_attempts=max_attempts
    )
    assert worker.finish(lease, outcome, retryable=retryable) == state
    standing = service.standing(lease)
    assert (standing.state, standing.failures) == (state, failures)


@pytest.mark.parametrize("outcome", ["succeeded", "pruned", "diverged"])
def test_finishing_again_gives_the_same_state_and_changes_nothing(service, worker, outcome):
    service.offer()
    lease = worker.lease_one()
    worker.publish(lease)
    state = worker.finish(lease, outcome, loss=2.0)
    before = service.standing(lease)
    for other in (outcome, "succeeded", "failed", "released"):
        assert worker.finish(lease, other, loss=9.0) == state
    assert service.standing(lease) == before


def test_a_released_run_goes_on_at_once_from_its_newest_checkpoint(service, worker):
    service.offer()
    lease = worker.lease_one()
    for step in (5, 10):
        worker.report(lease, {"step": step, "tokens": step * 256, "loss_nats": 1.0})
        worker.publish(lease, step=step, final=False)
    assert worker.finish(lease, "released") == "queued"
    again = worker.lease_one()
    assert (again.run_id, again.attempt, again.params) == (lease.run_id, 2, lease.params)
    assert (again.spec, again.reported_step) == (lease.spec, 10)
    uris = [f"{lease.artifact_uri}/step-{step:08d}" for step in (10, 5)]
    assert [ref.uri for ref in again.resume_from] == uris
    assert again.artifact_uri != lease.artifact_uri


def test_a_failed_run_goes_on_after_a_second(service, worker):
    service.offer()
    lease = worker.lease_one()
    assert worker.finish(lease, "failed", error="boom") == "queued"
    start = time.monotonic()
    assert worker.lease() == ()
    assert worker.lease_one(wait_seconds=5).attempt == 2
    assert 0.8 < time.monotonic() - start < PROMPT_SECONDS


def test_a_success_without_its_loss_is_refused(service, worker):
    service.offer()
    lease = worker.lease_one()
    with pytest.raises(ServiceError) as refused:
        worker.finish(lease, loss=None)
    assert refused.value.status == 422
    assert service.standing(lease).state == "leased"


# Messages


def test_every_answer_is_a_message_of_the_protocol(service, worker, post):
    service.offer()
    answer = post("/v1/leases", {"worker": "w", "resources": {"cpus": 1}})
    (lease,) = LeaseReply.model_validate_json(answer.content).leases
    replies = (ReportReply, CheckpointReply, FinishReply)
    for (path, body), reply in zip(list_writes(lease), replies, strict=True):
        answer = post(path, body, token=lease.lease_token)
        assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
        reply.model_validate_json(answer.content)


def test_an_unknown_run_is_not_found(service, worker, post):
    service.offer()
    lease = worker.lease_one().model_copy(update={"run_id": "nobody"})
    for path, body in list_writes(lease):
        assert read_problem(post(path, body, token=lease.lease_token)) == (404, "not-found"), path


@pytest.mark.parametrize("key", ["wrong", None])
def test_without_a_good_key_nothing_is_leased_and_nothing_written(service, worker, post, key):
    service.offer(2)
    lease = worker.lease_one()
    before = service.standing(lease)
    for path, body in [("/v1/leases", {"worker": "w"}), *list_writes(lease)]:
        assert read_problem(post(path, body, key=key, token=lease.lease_token))[0] == 401, path
    assert service.standing(lease) == before
    assert len(worker.lease(8)) == 1
    with Client(service.url, "wrong") as client, pytest.raises(ServiceError, match="unknown"):
        Worker(client).lease()


def test_a_body_that_is_no_message_is_invalid_and_writes_nothing(service, worker, post):
    service.offer()
    lease = worker.lease_one()
    before = service.standing(lease)
    for path in ("/v1/leases", *(path for path, _ in list_writes(lease))):
        for body in NO_MESSAGES:
            answer = post(path, body, token=lease.lease_token)
            assert read_problem(answer) == (422, "invalid"), (path, body)
    assert service.standing(lease) == before


def test_a_write_without_a_token_is_invalid(service, worker, post):
    service.offer()
    lease = worker.lease_one()
    before = service.standing(lease)
    for path, body in list_writes(lease):
        assert read_problem(post(path, body)) == (422, "invalid"), path
    assert service.standing(lease) == before


def test_numbers_out_of_range_are_named(service, worker, post):
    service.offer()
    lease = worker.lease_one()
    point = {"step": -1, "tokens": 0}
    path = f"/v1/runs/{lease.run_id}/measurements"
    answer = post(path, {"measurements": [point]}, token=lease.lease_token)
    assert read_problem(answer) == (422, "invalid")
    (error,) = answer.json()["errors"]
    assert (error["path"], error["value"]) == ("measurements.0.step", -1)
