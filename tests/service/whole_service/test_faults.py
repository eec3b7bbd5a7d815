"""A study's fault ends that study alone, and an outage of the service costs no worker its run."""

import threading

import httpx
import pytest
from sqlalchemy import select, text, update
from sqlalchemy.exc import OperationalError

from service.access import lookup
from service.client import ServiceError
from service.database.tables import Event, Run, Study
from service.events.audit_log import record_event
from service.leases import attempts
from service.leases import rounds as lease_rounds
from service.leases.presence import Presence
from service.operations import invariants
from service.studies import advance
from tests.by_hand import EVERYWHERE, forget_presence

ONE = {"trials": 1, "parallel": 1, "sampler": "random", "pruner": "none"}


def poison(api, study, **changes):
    """Change a stored spec to a form that only a newer version can read."""
    with api.sessions.begin() as session:
        row = session.get(Study, study["id"])
        row.spec = row.spec | changes


def test_a_study_that_cannot_start_a_trial_fails_alone_and_says_why(
    api, submit, worker, monkeypatch
):
    bad, good = submit(), submit()
    draw = api.sampler.sample_trials

    def fails_for_one(name, *arguments):
        if name == bad["name"]:
            raise ValueError("no such point")
        return draw(name, *arguments)

    monkeypatch.setattr(api.sampler, "sample_trials", fails_for_one)
    assert {lease.study_id for lease in worker.lease(2)} == {good["id"]}
    view = api.client.get("/v1/runs", study=bad["id"])
    assert view["items"] == []
    with api.sessions() as session:
        row = session.get(Study, bad["id"])
        assert (row.state, "cannot start a trial" in row.reason) == ("failed", True)


def test_a_fault_in_what_follows_a_run_keeps_the_run_and_fails_the_study(
    api, submit, worker, monkeypatch
):
    study = submit(hpo=ONE)
    lease = worker.lease_one()
    # Without the function every step raises a NameError.
    with monkeypatch.context() as patch:
        patch.delattr(advance, "plan_next_step")
        assert worker.complete(lease) == "succeeded"
    with api.sessions() as session:
        row = session.get(Study, study["id"])
        assert (row.state, "cannot move on" in row.reason) == ("failed", True)
    submit()
    assert len(worker.lease(2)) == 2


@pytest.mark.parametrize(
    "newer",
    [{"of_tomorrow": 1}, {"resources": {"trial": {"npus": 1}}}, {"search_space": {"lr": "learnt"}}],
)
def test_a_study_that_only_a_newer_version_can_read_is_left_to_it(
    api, submit, worker, newer, caplog
):
    before = submit(hpo=ONE)
    poison(api, before, **newer)
    after = submit(hpo=ONE)
    assert [lease.study_id for lease in worker.lease(2, wait_seconds=1)] == [after["id"]]
    assert worker.lease(2) == ()
    with api.sessions() as session:
        assert session.get(Study, before["id"]).state == "active"
        found = invariants.check_database(session)
        at_rest = invariants.check_database(session, at_rest=True)
    assert [(one.invariant, one.study_id) for one in found.pending] == [
        ("specs-read", before["id"])
    ]
    assert found.violations == ()
    assert "specs-read" in {one.invariant for one in at_rest.violations}
    logged = [r for r in caplog.records if "left to another version" in r.getMessage()]
    assert [record.study for record in logged] == [before["id"]]
    with api.sessions.begin() as session:
        row = session.get(Study, before["id"])
        row.spec = before["spec"]
    assert worker.lease_one().study_id == before["id"]


def test_the_last_end_of_a_study_of_a_newer_version_waits_for_it(api, submit, worker):
    """The worker gets a 503 and retries; its reports are accepted meanwhile."""
    study = submit(hpo=ONE | {"pruner": "median"})
    lease = worker.lease_one()
    poison(api, study, of_tomorrow=1)
    assert worker.evaluate(lease, 1, 3.0) == "continue"
    worker.publish(lease)
    with pytest.raises(ServiceError) as refused:
        worker.finish(lease)
    assert (refused.value.status, refused.value.type) == (503, "urn:warmscale:needs-upgrade")
    with api.sessions.begin() as session:
        session.get(Study, study["id"]).spec = study["spec"]
    assert worker.finish(lease) == "succeeded"
    assert api.client.get(f"/v1/studies/{study['id']}")["state"] == "active"


@pytest.mark.tampers
def test_a_late_lease_of_a_newer_version_s_study_holds_up_no_other(api, submit, worker):
    newer = submit(hpo=ONE, max_attempts=1)
    late = worker.lease_one()
    poison(api, newer, of_tomorrow=1)
    with api.sessions.begin() as session:
        session.execute(update(Run).values(lease_expires_at=text("now() - interval '1 hour'")))
    other = submit(hpo=ONE)
    assert [lease.study_id for lease in worker.lease(2, wait_seconds=1)] == [other["id"]]
    with api.sessions() as session:
        assert session.get(Run, late.run_id).state == "leased"
        assert session.get(Study, newer["id"]).state == "active"


def test_an_end_that_nothing_follows_is_taken_by_every_version(api, submit, worker):
    study = submit(hpo=ONE | {"trials": 2, "parallel": 2})
    first, second = worker.lease(2)
    poison(api, study, of_tomorrow=1)
    assert worker.finish(first, "released") == "queued"
    again = worker.lease(1)
    assert worker.finish(second) == "succeeded"
    with api.sessions.begin() as session:
        session.get(Study, study["id"]).spec = study["spec"]
    (again,) = again or worker.lease(1)
    assert worker.finish(again) == "succeeded"


@pytest.mark.tampers
def test_a_late_lease_that_is_left_to_another_version_is_not_asked_for_all_the_time(
    api, submit, worker, monkeypatch
):
    study = submit(hpo=ONE, max_attempts=1)
    worker.lease_one()
    poison(api, study, of_tomorrow=1)
    with api.sessions.begin() as session:
        session.execute(update(Run).values(lease_expires_at=text("now() - interval '1 hour'")))
    rounds, serve = [], lease_rounds.serve_round
    monkeypatch.setattr(lease_rounds, "serve_round", lambda *a: rounds.append(1) or serve(*a))
    assert worker.lease(1, wait_seconds=2) == ()
    assert len(rounds) <= 3


def test_what_was_granted_is_returned_though_the_next_ask_fails(api, submit, worker, monkeypatch):
    submit(hpo=ONE)
    worker.finish(worker.lease_one(), "released")

    def away(*_):
        raise OperationalError("", {}, Exception("away"))

    submit()
    monkeypatch.setattr(api.sampler, "sample_trials", away)
    assert len(worker.lease(2)) == 1


def test_a_study_whose_target_cannot_be_trained_is_refused_at_submission(api, study_spec):
    space = {"warmup_fraction": {"type": "float", "low": 0.2, "high": 0.3}}
    target = {"width": 64, "train": {"cooldown_fraction": 0.9}}
    with pytest.raises(ServiceError, match="exceed 1") as refused:
        api.client.post("/v1/studies", study_spec(search_space=space, target=target))
    assert refused.value.problem["errors"][0]["path"] == "target.train"


def test_cancelling_while_a_checkpoint_is_published_deadlocks_nobody(api, submit, worker):
    study = submit()
    lease = worker.lease_one()
    with api.sessions.begin() as session:
        run = attempts.renew_lease(session, EVERYWHERE, lease.run_id, lease.lease_token, 5.0)
        cancel = threading.Thread(
            target=lambda: api.client.post(f"/v1/studies/{study['id']}/cancel")
        )
        cancel.start()
        cancel.join(0.5)
        # The cancel holds the study's row and waits for the run's. A publish that now locked the
        # study would deadlock; an event only refers to it.
        assert cancel.is_alive()
        record_event(session, "run.noted", study_id=run.study_id, run_id=run.id)
    cancel.join(30)
    assert api.client.get(f"/v1/studies/{study['id']}")["state"] == "cancelled"


def test_after_an_absence_of_ours_leases_get_their_time_again(api, submit, worker):
    submit()
    lease = worker.lease_one()
    with api.sessions.begin() as session:
        session.execute(update(Run).values(lease_expires_at=text("now() - interval '1 hour'")))
    forget_presence(api)
    worker.lease(1)
    run = api.client.get(f"/v1/runs/{lease.run_id}")
    assert (run["state"], run["failures"]) == ("leased", 0)
    assert worker.complete(lease) == "succeeded"


def test_an_absence_is_not_over_before_it_is_made_good():
    presence = Presence(1000.0)
    assert [presence.note_request(), presence.note_request()] == [False, False]
    presence.note_extended()
    assert presence.note_request()
    # With a negative lease time every request comes after an absence.
    short = Presence(-1.0)
    short.note_extended()
    assert not short.note_request()


def test_a_checkpoint_that_a_target_grows_from_is_kept(api, submit, worker):
    study = submit(target=None)
    lease = worker.lease_one()
    worker.publish(lease, step=5, final=False)
    (base,) = api.client.get(f"/v1/runs/{lease.run_id}/checkpoints")["items"]
    body = {"checkpoint": base["id"], "target": {"width": 64}}
    api.client.post(f"/v1/studies/{study['id']}/targets", body)
    gone = [worker.publish(lease, step=s, final=False).superseded for s in (10, 15, 20)]
    assert not any(base["uri"] in uris for uris in gone)


def test_a_study_without_target_needs_no_checkpoints(api, submit, worker):
    study = submit(target=None, hpo=ONE)
    worker.finish(worker.lease_one(), loss=2.0)
    assert api.client.get(f"/v1/studies/{study['id']}")["state"] == "completed"


def test_growth_starts_from_the_best_trial_that_has_a_checkpoint(api, submit, worker):
    submit(hpo=ONE | {"trials": 2})
    worker.finish(worker.lease_one(), loss=1.0)
    second = worker.lease_one()
    worker.complete(second, 2.0)
    warm = [lease for lease in worker.lease(4) if lease.arm == "warm"]
    assert {lease.spec.growth.base.uri for lease in warm} == {
        f"{second.artifact_uri}/step-00000020"
    }


@pytest.mark.tampers
def test_targets_started_by_hand_outlive_their_study_and_can_be_cancelled(api, submit, worker):
    study = submit(target=None)
    for loss in (1.0, 2.0, 3.0, 4.0):
        worker.complete(worker.lease_one(), loss)
    path = f"/v1/studies/{study['id']}"
    api.client.post(f"{path}/targets", {"target": {"width": 64}})
    with api.sessions.begin() as session:
        session.execute(update(Study).values(state="failed"))
    assert len(worker.lease(2)) == 2
    assert api.client.post(f"{path}/cancel")["targets"]["cancelled"] == 4
    with pytest.raises(ServiceError, match="409"):
        api.client.post(f"{path}/cancel")


def test_a_stream_waits_for_an_event_that_commits_after_a_later_one(api, submit):
    study = submit()
    path = f"{api.url}/v1/studies/{study['id']}"
    headers = {"Authorization": f"Bearer {api.key}"}
    # Its event has the lower id and commits later.
    early = api.sessions()
    record_event(early, "early", study_id=study["id"])
    api.client.post(f"/v1/studies/{study['id']}/pause")
    seen = []
    with httpx.stream("GET", f"{path}/events", headers=headers, timeout=10) as response:
        for line in response.iter_lines():
            if line.startswith("event: "):
                seen.append(line.removeprefix("event: "))
            if seen == ["study.created"]:
                seen.append("(committed)")
                early.commit()
            if "study.paused" in seen:
                break
    early.close()
    assert seen == ["study.created", "(committed)", "early", "study.paused"]


def test_every_event_has_its_transaction(api, submit):
    submit()
    with api.sessions() as session:
        assert all(event.xid > 0 for event in session.scalars(select(Event)))


def test_the_runs_of_a_study_are_pinned_to_the_corpus_as_it_was(api, submit, worker, corpus):
    from warmcore.corpus import prepare

    study = submit()
    lease = worker.lease_one()
    assert lease.spec.data.hash == study["spec"]["data"]["hash"] is not None
    (corpus / "more.txt").write_text("one more document\n" * 40)
    with pytest.raises(ValueError, match="has changed"):
        prepare.prepare_corpus(lease.spec.data)


def test_a_study_may_name_the_corpus_it_expects(api, study_spec, corpus):
    other = {"source": str(corpus), "context": 32, "hash": "0" * 64}
    with pytest.raises(ServiceError, match="the corpus has hash"):
        api.client.post("/v1/studies", study_spec(data=other))


def test_the_same_key_gives_the_same_study_though_the_corpus_has_changed(api, study_spec, corpus):
    spec = study_spec()
    first = api.client.post("/v1/studies", spec, idempotency_key="k")
    (corpus / "more.txt").write_text("one more document\n" * 40)
    assert api.client.post("/v1/studies", spec, idempotency_key="k") == first


def test_leasing_from_a_study_that_does_not_exist_is_a_404(worker):
    with pytest.raises(ServiceError, match="404"):
        worker.lease(1, study="typo")


def test_a_grid_trial_that_is_adopted_keeps_its_point(api, submit, worker):
    import optuna

    space = {"lr": {"type": "categorical", "choices": [0.001, 0.002, 0.004]}}
    study = submit(search_space=space, hpo=ONE | {"trials": 3, "parallel": 3, "sampler": "grid"})
    storage = api.sampler.storage
    optuna.load_study(study_name=study["name"], storage=storage).ask()
    # The first request is answered with the adopted trial alone.
    leases = [*worker.lease(3), *worker.lease(3)]
    assert sorted(lease.params["lr"] for lease in leases) == [0.001, 0.002, 0.004]


def test_studies_are_found_by_id_before_name(api, submit):
    first = submit()
    with api.sessions() as session:
        assert lookup.find_study(session, EVERYWHERE, first["name"]).id == first["id"]
