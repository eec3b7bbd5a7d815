"""An API that ends and starts again while a client waits for work."""

import signal
from concurrent.futures import ThreadPoolExecutor

from sqlalchemy import create_engine
from sqlalchemy.orm import Session

from service.access import keys
from service.client import Client
from tests.by_hand import Worker
from tests.conftest import find_violations
from tests.service.whole_service.replicas import Serving


def asked_until_there_is_work(worker):
    """Ask again and again, as a fleet does: an API that shuts down answers with no runs."""
    while not (leases := worker.lease(1, wait_seconds=30)):
        pass
    return leases


def test_a_client_that_waits_is_given_work_by_the_api_that_was_started_again(
    settings, database_url, study_spec, tmp_path
):
    engine = create_engine(database_url)
    with Session(engine) as session, session.begin():
        _, key = keys.create_key(session, "test", ["admin"])
    serving = Serving(settings, database_url, tmp_path / "api.log")
    try:
        serving.wait_until_ready()
        with (
            Client(serving.url, key, patience_seconds=90) as client,
            Client(serving.url, key, patience_seconds=90) as other,
            ThreadPoolExecutor(1) as pool,
        ):
            for ends in (signal.SIGKILL, signal.SIGTERM):
                waits = pool.submit(asked_until_there_is_work, Worker(client))
                other.get("/v1/studies")
                serving.process.send_signal(ends)
                serving.process.wait(30)
                assert not waits.done()
                serving = Serving(settings, database_url, tmp_path / "api.log")
                serving.wait_until_ready()
                study = other.post("/v1/studies", study_spec(), idempotency_key=str(ends))
                (lease,) = waits.result(90)
                assert (lease.study_id, lease.attempt) == (study["id"], 1)
                assert Worker(other).complete(lease) == "succeeded"
                other.post(f"/v1/studies/{study['id']}/cancel")
        assert find_violations(engine) == ()
    finally:
        serving.stop()
        engine.dispose()
