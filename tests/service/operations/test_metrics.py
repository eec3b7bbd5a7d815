"""The metrics as Prometheus parses them; each event counts once, after its commit."""

from datetime import timedelta

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import func, text, update

from benchmarks.ports import free_port
from service.client import StaleLeaseError
from service.database.tables import Run
from service.events import audit_log
from service.observability import metrics
from tests.conftest import serve_api

ONE = {"trials": 1, "parallel": 1, "sampler": "random", "pruner": "none"}
HOUR_SECONDS = 3600.0


def scrape(api):
    """Return the families of metrics by name, as Prometheus' own parser reads them."""
    answer = httpx.get(f"{api.url}/metrics", headers={"Authorization": f"Bearer {api.key}"})
    assert answer.headers["content-type"].startswith("text/plain; version=")
    families = list(text_string_to_metric_families(answer.text))
    assert len({family.name for family in families}) == len(families)
    return {family.name: family for family in families}


def value(api, name, **labels):
    """Return the value of the sample with this name and these labels; 0 if there is no sample."""
    found = [
        sample.value
        for family in scrape(api).values()
        for sample in family.samples
        if sample.name == name and sample.labels == labels
    ]
    assert len(found) <= 1
    return found[0] if found else 0.0


@pytest.fixture
def change(api):
    """Return a function that returns the growth of a sample since its last call, None at first."""
    # Counters belong to the process, and other tests in it have counted already.
    last = {}

    def grown(name, **labels):
        key = (name, *sorted(labels.items()))
        before, last[key] = last.get(key), value(api, name, **labels)
        return None if before is None else last[key] - before

    return grown


def test_names_and_units_are_as_prometheus_has_them(api, submit, worker):
    submit(hpo=ONE)
    worker.lease_one()
    found = scrape(api)
    assert len(found) > 12
    for family in found.values():
        assert family.name.startswith("warmscale_")
        assert family.documentation.endswith("."), family.name
        assert not family.name.endswith(("_created", "_ms", "_milliseconds", "_minutes"))
        # A counter's samples end with `_total`, and no gauge's sample does.
        is_total = {sample.name.endswith("_total") for sample in family.samples}
        assert family.type == "counter" or True not in is_total, family.name
        assert family.type != "counter" or False not in is_total, family.name
    assert found["warmscale_request_seconds"].type == "histogram"
    (build,) = found["warmscale_build_info"].samples
    assert (build.value, set(build.labels)) == (1.0, {"version", "python"})


def test_a_granted_lease_is_counted_once_by_its_kind(api, submit, worker, change):
    names = [
        ("warmscale_leases_granted_total", {"kind": "trial"}),
        ("warmscale_leases_granted_total", {"kind": "target"}),
        ("warmscale_events_total", {"type": "run.leased"}),
    ]
    for name, labels in names:
        change(name, **labels)
    submit(hpo=ONE | {"trials": 3, "parallel": 3}, target=None)
    assert len(worker.lease(2)) == 2
    # A kind that was never leased stays at 0.
    assert [change(name, **labels) for name, labels in names] == [2, 0, 2]


def test_a_lease_that_ran_out_is_counted_once_and_what_its_worker_writes_then(
    api, submit, worker, change
):
    names = ["warmscale_leases_expired_total", "warmscale_stale_writes_total"]
    for name in names:
        change(name)
    submit(hpo=ONE)
    late = worker.lease_one()
    with api.sessions.begin() as session:
        session.execute(update(Run).values(lease_expires_at=func.now() - text("interval '1 s'")))
    # The first request expires the lease; the next two must not count it again.
    for _ in range(3):
        worker.lease(1)
    assert [change(name) for name in names] == [1, 0]
    for _ in range(2):
        with pytest.raises(StaleLeaseError):
            worker.evaluate(late, 1, 2.0)
    with pytest.raises(StaleLeaseError):
        worker.finish(late)
    assert [change(name) for name in names] == [0, 3]
    assert value(api, "warmscale_problems_total", type="stale-lease") >= 3


@pytest.fixture
def counted(monkeypatch):
    """Return the list of the types of events that are counted from now on."""
    types = []
    monkeypatch.setattr(metrics, "count_event", lambda type_, _: types.append(type_))
    return types


def record(session, *types):
    for type_ in types:
        audit_log.record_event(session, type_, study_id=None)


def test_what_is_rolled_back_is_not_counted(api, counted):
    # A session goes on after a rollback: its next commit must count only the later event.
    with api.sessions() as session:
        record(session, "test.undone")
        session.rollback()
        record(session, "test.done")
        assert counted == []
        session.commit()
        assert counted == ["test.done"]
        session.commit()
    with pytest.raises(ZeroDivisionError), api.sessions.begin() as session:
        record(session, "test.undone")
        _ = 1 / 0
    assert counted == ["test.done"]


def test_of_savepoints_those_are_counted_that_stand_and_when_all_commits(api, counted):
    with api.sessions.begin() as session:
        record(session, "test.before")
        with session.begin_nested():
            record(session, "test.kept")
        assert counted == []
        with pytest.raises(ZeroDivisionError), session.begin_nested():
            record(session, "test.undone")
            with session.begin_nested():
                record(session, "test.released, then undone around it")
            _ = 1 / 0
        record(session, "test.after")
    assert counted == ["test.before", "test.kept", "test.after"]


def test_a_transition_that_its_database_refused_is_not_counted(api, submit, worker, change):
    """Let the database refuse a transaction at its commit, after the event was written."""
    change("warmscale_events_total", type="run.succeeded")
    submit(hpo=ONE, target=None)
    lease = worker.lease_one()
    # A deferred trigger runs at the commit. 57P03 is "cannot connect now": the service answers 503.
    refuse = """
        CREATE FUNCTION pg_temp_refuse() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN RAISE EXCEPTION 'no' USING ERRCODE = '57P03'; END $$;
        CREATE CONSTRAINT TRIGGER refuse AFTER INSERT ON warmscale.events
        DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION pg_temp_refuse();
    """
    with api.engine.begin() as connection:
        connection.execute(text(refuse))
    api.client.patience_seconds = 0
    with pytest.raises(Exception, match=r"503|500"):
        worker.finish(lease)
    assert change("warmscale_events_total", type="run.succeeded") == 0
    with api.engine.begin() as connection:
        connection.execute(text("DROP TRIGGER refuse ON warmscale.events"))
    assert worker.finish(lease) == "succeeded"
    assert change("warmscale_events_total", type="run.succeeded") == 1


def test_the_age_of_the_queue_is_of_the_run_that_waited_longest(api, submit, worker):
    submit(hpo=ONE | {"trials": 2, "parallel": 2})
    name, kind = "warmscale_queue_age_seconds", {"kind": "trial"}
    for lease in worker.lease(2):
        worker.finish(lease, "released")

    def wait(number, hours):
        since = func.now() - timedelta(hours=hours)
        with api.sessions.begin() as session:
            session.execute(
                update(Run).where(Run.trial_number == number).values(available_at=since)
            )
        return value(api, name, **kind)

    # Trial 0 waits for 2 h, then also trial 1 for 1 h: the age is that of trial 0. A retry that is
    # due in an hour has a negative age.
    assert 2 * HOUR_SECONDS <= wait(0, 2) < 2 * HOUR_SECONDS + 300
    assert 2 * HOUR_SECONDS <= wait(1, 1) < 2 * HOUR_SECONDS + 300
    assert 1 * HOUR_SECONDS <= wait(0, -1) < 1 * HOUR_SECONDS + 300
    assert wait(1, -1) == 0  # none is due


def test_states_and_speed_are_the_databases_from_every_replica(
    api, submit, worker, settings, database_url
):
    submit(hpo=ONE | {"trials": 3, "parallel": 3})
    for lease, speed in zip(worker.lease(3), (100.0, 20.0, 3.0), strict=True):
        worker.report(lease, {"step": 1, "tokens": 256, "tokens_per_second": speed})
    worker.finish(lease)
    other = settings.model_copy(update={"port": free_port()})
    with serve_api(other, database_url) as replica:
        # 100 + 20: the third run has finished, and its speed no longer counts.
        for server in (api, replica):
            assert value(server, "warmscale_runs", kind="trial", state="leased") == 2
            assert value(server, "warmscale_runs", kind="trial", state="succeeded") == 1
            assert value(server, "warmscale_studies", state="active") == 1
            assert value(server, "warmscale_tokens_per_second", kind="trial") == 120


def test_connections_in_use_are_counted_by_pool(api):
    name = "warmscale_database_connections_in_use"
    idle = value(api, name, pool="service")
    with api.engine.connect(), api.engine.connect():
        assert value(api, name, pool="service") == idle + 2
    assert value(api, name, pool="service") == idle
    assert value(api, "warmscale_database_pool_size", pool="service") == 10
    assert value(api, "warmscale_database_pool_size", pool="optuna") > 0
