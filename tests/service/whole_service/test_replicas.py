"""Several replicas of the API on a database, kills of a replica and of the database."""

import contextlib
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from sqlalchemy import create_engine, func, select, text
from sqlalchemy.orm import Session

from benchmarks.ports import free_port
from service.access import keys
from service.client import ServiceError, StaleLeaseError
from service.database import engine as db
from service.database.tables import Event, Run
from service.operations import migrations
from tests.by_hand import Worker
from tests.conftest import find_violations, make_scratch_folder, make_settings, serve_api
from tests.service.whole_service.replicas import Serving, balanced

LISTENER = 1


def connections(engine):
    """The number of connections to this database, without our own."""
    query = (
        "SELECT count(*) FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        " AND backend_type = 'client backend'"
    )
    with engine.connect() as connection:
        return connection.scalar(text(query))


@contextlib.contextmanager
def watched(engine):
    """A list of the most connections at once while the block runs."""
    most, over = [0], threading.Event()

    def watch():
        while not over.wait(0.02):
            most[0] = max(most[0], connections(engine))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield most
    finally:
        over.set()
        thread.join()


@pytest.fixture
def engine(database_url):
    engine = create_engine(database_url, isolation_level="AUTOCOMMIT")
    yield engine
    engine.dispose()


def train(client, study, stop):
    """Lease, evaluate and finish as a worker until the study has ended."""
    worker, busy = Worker(client, threading.current_thread().name), 0
    while not stop.is_set():
        for lease in worker.lease(2, study=study, wait_seconds=0.5):
            busy += 1
            with contextlib.suppress(StaleLeaseError):
                worker.evaluate(lease, 1, 2.0)
                worker.complete(lease, loss=1.0 + (lease.trial_number or 0))
        if client.get(f"/v1/studies/{study}")["state"] == "completed":
            return busy
    return busy


def test_a_study_on_two_replicas_of_which_one_is_killed_has_each_step_once(
    settings, database_url, engine, study_spec, tmp_path
):
    with Session(engine) as session, session.begin():
        _, key = keys.create_key(session, "test", ["admin"])
    chosen = settings.model_copy(update={"lease_seconds": 2.0, "pool_size": 3})
    each = [chosen.model_copy(update={"port": free_port()}) for _ in range(2)]
    replicas = [Serving(one, database_url, tmp_path / f"api-{n}.log") for n, one in enumerate(each)]
    stop = threading.Event()
    try:
        for replica in replicas:
            replica.wait_until_ready()
        urls = [replica.url for replica in replicas]
        hpo = {"trials": 16, "parallel": 8, "sampler": "random", "pruner": "none"}
        with (
            balanced(urls, key) as client,
            ThreadPoolExecutor(6) as pool,
            watched(engine) as most,
        ):
            spec = study_spec(hpo=hpo, max_attempts=20, warmstart={"seeds": 1})
            study = client.post("/v1/studies", spec, idempotency_key="k")["id"]
            fleets = [pool.submit(train, client, study, stop) for _ in range(6)]
            while sum(t["state"] == "succeeded" for t in trials_of(client, study)) < 4:
                time.sleep(0.02)
            # SIGKILL while requests are being served.
            replicas[0].stop()
            again = Serving(each[0], database_url, tmp_path / "api-0.log")
            replicas.append(again)
            try:
                for fleet in fleets:
                    fleet.result(120)
            finally:
                stop.set()
            view = client.get(f"/v1/studies/{study}")
            answers = list(client.answers)
        assert (view["state"], view["trials"]["succeeded"]) == ("completed", 16)
        assert view["targets"]["succeeded"] == 2
        assert not [a for a in answers if a[2] == 500]
        assert most[0] <= 2 * (3 * chosen.pool_size + LISTENER)
        check_each_step_once(engine, study)
        checking = create_engine(database_url)
        assert find_violations(checking) == ()
        checking.dispose()
    finally:
        stop.set()
        for replica in replicas:
            replica.stop()


def trials_of(client, study):
    return client.get(f"/v1/studies/{study}/trials")["items"]


def check_each_step_once(engine, study):
    """Check that no replica repeated a transition that another had made."""
    with Session(engine) as session:
        once = ("study.completed", "run.succeeded")
        query = (
            select(Event.type, Event.run_id, func.count())
            .where(Event.study_id == study, Event.type.in_(once))
            .group_by(Event.type, Event.run_id)
        )
        found = list(session.execute(query))
        assert {count for _, _, count in found} == {1}
        assert sum(type_ == "study.completed" for type_, _, _ in found) == 1
        numbers = session.scalars(
            select(Run.trial_number).where(Run.study_id == study, Run.kind == "trial")
        )
        assert sorted(numbers) == list(range(16))


def test_sixty_four_clients_at_once_use_no_more_connections_than_are_written_down(
    settings, database_url, engine, study_spec
):
    """No client gets "has already finished and can not be updated" (optuna #5582)."""
    pool_size = 3
    with (
        serve_api(settings.model_copy(update={"pool_size": pool_size}), database_url) as api,
        balanced([api.url], api.key) as client,
        ThreadPoolExecutor(64) as pool,
        watched(engine) as most,
    ):
        hpo = {"trials": 64, "parallel": 64, "sampler": "random", "pruner": "none"}
        client.post("/v1/studies", study_spec(hpo=hpo, target=None))

        def one_trial(_):
            worker = Worker(client)
            lease = worker.lease_one(wait_seconds=20)
            worker.evaluate(lease, 1, 2.0)
            return worker.complete(lease)

        assert set(pool.map(one_trial, range(64))) == {"succeeded"}
        assert not [a for a in client.answers if a[2] == 500]
    assert 0 < most[0] <= 3 * pool_size + LISTENER


def test_an_api_outlives_its_database_and_goes_on_by_itself(study_spec):
    with warnings.catch_warnings(), make_scratch_folder() as folder, make_scratch_folder() as home:
        warnings.simplefilter("ignore")
        server = db.start_embedded(folder)
        url = db.normalize_url(server.get_uri())
        migrations.upgrade_database(url)
        with serve_api(make_settings(home), url) as api:
            api.client.post("/v1/studies", study_spec())
            worker = Worker(api.client)
            lease = worker.lease_one()
            # SIGKILL for the postmaster; its backends notice and exit.
            server.get_postmaster_info().process.kill()
            while httpx.get(f"{api.url}/readyz").status_code == 200:
                time.sleep(0.02)
            away = httpx.get(f"{api.url}/readyz")
            assert (away.status_code, away.headers["Retry-After"]) == (503, "1")
            assert httpx.get(f"{api.url}/healthz").status_code == 200
            with pytest.raises(ServiceError, match="cannot be reached"):
                worker.report(lease)
            while any(p.is_running() for p in _backends(server)):
                time.sleep(0.05)
            server.ensure_postgres_running()
            api.client.patience_seconds = 60
            assert worker.report(lease) == "continue"
            assert httpx.get(f"{api.url}/readyz").status_code == 200
            assert worker.complete(lease) == "succeeded"
            assert len(worker.lease(2, wait_seconds=5)) == 2
            assert find_violations(api.engine) == ()
        server._cleanup()


def _backends(server):
    import psutil

    for process in psutil.process_iter(["cmdline", "name"]):
        command = " ".join(process.info["cmdline"] or [])
        if (process.info["name"] or "").startswith("postgres") and str(server.pgdata) in command:
            yield process
