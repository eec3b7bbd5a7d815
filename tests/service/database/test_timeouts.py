"""Timeouts: every wait on the database ends, with a 503 and the time of the next attempt."""

import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from service.client import Client, ServiceError
from service.database import engine as db
from service.database.tables import Run
from service.leases import new_trials
from service.optuna_bridge import sampler
from service.settings import Settings
from service.studies.locks import lock_study
from service.web.services import find_service
from tests.by_hand import Worker
from tests.conftest import serve_api

LIMITS = {
    "statement_timeout": "30s",
    "lock_timeout": "10s",
    "idle_in_transaction_session_timeout": "1min",
    "TimeZone": "UTC",
}


def test_both_engines_have_the_same_limits(api):
    for engine in (api.sessions.kw["bind"], api.sampler.engine):
        with engine.connect() as connection:
            found = {name: connection.scalar(text(f"SHOW {name}")) for name in LIMITS}
        assert found == LIMITS
        assert len(engine.pool.dispatch.checkout) == 1  # the pool tests idle connections
        assert engine.pool._timeout == 5.0


def test_options_of_the_url_are_kept_beside_ours(database_url):
    url = database_url.update_query_dict({"options": "-c work_mem=7MB"})
    engine = db.make_engine(url, 1)
    with engine.connect() as connection:
        assert connection.scalar(text("SHOW work_mem")) == "7MB"
        assert connection.scalar(text("SHOW statement_timeout")) == "30s"
    engine.dispose()


@pytest.fixture
def hasty(settings, database_url, monkeypatch):
    """An API with two connections and short timeouts."""
    # On a machine with busy cores, a healthy request can be idle in its transaction for a second.
    quick = "-c lock_timeout=4s -c idle_in_transaction_session_timeout=2s"
    monkeypatch.setattr(db, "_SESSION_OPTIONS", quick)
    monkeypatch.setattr(db, "_POOL_TIMEOUT_SECONDS", 0.25)
    monkeypatch.setattr(sampler, "_WAIT_SECONDS", 0.25)
    with serve_api(settings.model_copy(update={"pool_size": 2}), database_url) as api:
        yield api


def expect_refusal(call):
    with pytest.raises(ServiceError) as answer:
        call()
    assert (answer.value.status, answer.value.type) == (503, "urn:warmscale:database-unavailable")


def make_impatient_client(api):
    return Client(api.url, api.key, patience_seconds=0)


def test_a_request_that_gets_no_connection_is_a_503_that_says_when_to_come_back(hasty):
    with hasty.sessions() as one, hasty.sessions() as other:
        one.connection()
        other.connection()
        answer = httpx.get(f"{hasty.url}/readyz")
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
    assert httpx.get(f"{hasty.url}/readyz").status_code == 200


def test_a_request_that_waits_for_a_lock_for_too_long_is_a_503(hasty, study_spec, database_url):
    study = hasty.client.post("/v1/studies", study_spec())
    patient = create_engine(database_url)
    with Session(patient) as holder, make_impatient_client(hasty) as client:
        lock_study(holder, study["id"])
        expect_refusal(lambda: client.post(f"/v1/studies/{study['id']}/pause"))
    patient.dispose()
    assert hasty.client.post(f"/v1/studies/{study['id']}/pause")["state"] == "paused"


def test_a_request_that_gets_no_turn_at_optuna_is_a_503(hasty, study_spec):
    study = hasty.client.post("/v1/studies", study_spec())
    # Both permits of a sampler with two connections are taken.
    permits = hasty.sampler._permits
    with permits, permits, make_impatient_client(hasty) as client:
        expect_refusal(lambda: client.get(f"/v1/studies/{study['id']}/trials"))
        expect_refusal(lambda: Worker(client).lease())
    assert len(Worker(hasty.client).lease(2)) == 2
    assert hasty.client.get(f"/v1/studies/{study['id']}")["state"] == "active"


def test_a_process_that_stands_still_in_a_transaction_holds_nobody_up(hasty, study_spec):
    study = hasty.client.post("/v1/studies", study_spec())
    # As if a replica was stopped or swapped out in the middle of this transaction.
    stopped = hasty.sessions()
    lock_study(stopped, study["id"])
    assert hasty.client.post(f"/v1/studies/{study['id']}/pause")["state"] == "paused"
    with pytest.raises(DBAPIError):
        stopped.commit()
    stopped.close()


def test_a_renewed_lease_is_as_long_as_it_says_though_its_report_had_to_wait(api, submit, worker):
    submit()
    lease = worker.lease_one()
    with api.sessions.begin() as holder, ThreadPoolExecutor(1) as pool:
        holder.execute(text("UPDATE warmscale.runs SET step = step"))
        report = pool.submit(worker.report, lease)
        time.sleep(1)
        free_at = holder.scalar(text("SELECT clock_timestamp()"))
        holder.commit()
        assert report.result(10) == "continue"
    with api.sessions() as session:
        expires_at = session.get(Run, lease.run_id).lease_expires_at
    assert (expires_at - free_at).total_seconds() >= lease.lease_seconds


def test_a_lease_is_as_long_as_it_says_though_its_transaction_was_slow(
    api, submit, worker, monkeypatch
):
    submit()
    write = new_trials.write_drafts

    def slow(session, drawn):
        session.execute(text("SELECT pg_sleep(1)"))
        return write(session, drawn)

    monkeypatch.setattr(new_trials, "write_drafts", slow)
    worker.lease_one()
    with api.sessions() as session:
        left = "SELECT extract(epoch FROM lease_expires_at - created_at) FROM warmscale.runs"
        assert session.scalar(text(left)) >= find_service(api.app, Settings).lease_seconds + 1
