"""After an absence of the service leases are extended once; all others expire in time."""

import time

import pytest
from sqlalchemy import text, update

from service.database.tables import Run
from service.leases import repair
from tests.by_hand import forget_presence

ONE = {"trials": 1, "parallel": 1, "sampler": "random", "pruner": "none"}
TWO = {"trials": 2, "parallel": 2, "sampler": "random", "pruner": "none"}


@pytest.fixture
def late(api):
    """Let every lease have expired a second ago."""

    def make():
        with api.sessions.begin() as session:
            session.execute(update(Run).values(lease_expires_at=text("now() - interval '1 s'")))

    return make


def state(api, lease):
    run = api.client.get(f"/v1/runs/{lease.run_id}")
    return run["state"], run["failures"]


def test_the_first_request_after_an_absence_may_be_a_report(api, submit, worker, late):
    submit(hpo=TWO)
    one, other = worker.lease(2)
    late()
    forget_presence(api)
    worker.report(one)
    worker.lease(1)
    assert state(api, other) == ("leased", 0)
    assert worker.complete(other) == "succeeded"


def test_a_replica_that_is_asked_seldom_gives_a_dead_workers_lease_time_once(
    api, submit, worker, late
):
    submit(hpo=ONE)
    dead = worker.lease_one()
    # Two replicas in turn, each after an absence of its own: the second extends nothing again.
    for _ in range(2):
        late()
        forget_presence(api)
        worker.lease(1)
    assert state(api, dead) == ("queued", 1)
    assert worker.lease_one(wait_seconds=5).attempt == 2


def test_a_worker_that_reported_since_gets_its_time_again_at_the_next_absence(
    api, submit, worker, late
):
    submit(hpo=ONE)
    alive = worker.lease_one()
    for _ in range(3):
        late()
        forget_presence(api)
        worker.lease(1)
        assert worker.report(alive) == "continue"
    assert state(api, alive) == ("leased", 0)


def test_a_grace_that_waits_for_a_run_in_use_passes_it_by(api, submit, worker, late):
    submit(hpo=ONE)
    lease = worker.lease_one()
    late()
    # With the row locked, an extension that waited for it would hang here.
    with api.sessions.begin() as session:
        session.execute(text("SELECT FROM warmscale.runs FOR UPDATE"))
        repair._extend_live_leases(api.sessions, 5.0)
    assert worker.report(lease) == "continue"


@pytest.mark.parametrize("days", [-1, 1])
def test_only_the_databases_clock_decides_about_leases(api, submit, worker, monkeypatch, days):
    """The clocks of workers and replicas are a day apart: no lease expires early or late."""
    submit(hpo=ONE | {"trials": 2})
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + days * 86400.0)
    lease = worker.lease_one()
    with api.sessions() as session:
        left = "SELECT extract(epoch FROM lease_expires_at - now()) FROM warmscale.runs"
        assert 0 < session.scalar(text(left)) <= lease.lease_seconds
    assert worker.lease(1) == ()
    assert worker.report(lease) == "continue"
    with api.sessions.begin() as session:
        session.execute(update(Run).values(lease_expires_at=text("now() - interval '1 ms'")))
    assert worker.lease(1) == ()
    again = worker.lease_one(wait_seconds=5)
    assert (again.run_id, again.attempt) == (lease.run_id, 2)
    assert worker.complete(again) == "succeeded"
