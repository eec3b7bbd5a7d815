"""Events as an audit log: each names its actor, and no statement can change it."""

import asyncio
import json

import pytest
from sqlalchemy import func, select, text, update
from sqlalchemy.exc import DBAPIError
from typer.testing import CliRunner

from service.access import keys
from service.access.caller import Caller
from service.cli import main
from service.client import Client
from service.database.tables import ApiKey, Event, Run
from service.protocol import LeaseRequest, Resources
from tests.by_hand import Worker, run_with_queue

ONE = {"trials": 1, "parallel": 1, "sampler": "random", "pruner": "none"}


@pytest.fixture
def key_of(api):
    """A function that makes a key and returns its id and a client."""
    clients = []

    def make(*scopes):
        with api.sessions.begin() as session:
            id_, key = keys.create_key(session, "-".join(scopes), list(scopes), project="default")
        clients.append(Client(api.url, key, patience_seconds=2))
        return id_, clients[-1]

    yield make
    for client in clients:
        client.close()


def read_log(api, **of):
    """Return the types and actors of the events of studies, in order."""
    with api.sessions() as session:
        query = select(Event.type, Event.actor).where(Event.study_id.is_not(None)).filter_by(**of)
        return [tuple(row) for row in session.execute(query.order_by(Event.id))]


def test_every_event_of_a_study_says_which_key_did_it(api, key_of, study_spec):
    ana, client = key_of("write", "read")
    bob, other = key_of("write")
    fleet, work = key_of("work")
    study = client.post("/v1/studies", study_spec(hpo=ONE | {"trials": 2}))["id"]
    other.post(f"/v1/studies/{study}/pause")
    client.post(f"/v1/studies/{study}/resume")
    other.post(f"/v1/studies/{study}/trials", {"params": {"lr": 0.01}})
    worker = Worker(work)
    worker.complete(worker.lease_one())
    other.post(f"/v1/studies/{study}/cancel")
    assert read_log(api) == [
        ("study.created", ana),
        ("study.paused", bob),
        ("study.active", ana),
        ("run.queued", fleet),
        ("run.leased", fleet),
        ("run.checkpoint", fleet),
        ("run.succeeded", fleet),
        ("study.cancelled", bob),
    ]


def test_targets_are_of_the_key_whose_finish_or_request_started_them(api, key_of, study_spec):
    ana, client = key_of("write")
    fleet, work = key_of("work")
    study = client.post("/v1/studies", study_spec(hpo=ONE))["id"]
    worker = Worker(work)
    worker.complete(worker.lease_one())
    own = read_log(api, type="run.queued")[1:]
    assert own
    assert {actor for _, actor in own} == {fleet}
    client.post(f"/v1/studies/{study}/targets", {"target": {"width": 96}}, idempotency_key="1")
    assert {actor for _, actor in read_log(api, type="run.queued")[1 + len(own) :]} == {ana}


def test_who_is_served_in_one_round_is_told_apart(api, submit):
    """A round runs in the context of the request that started it."""
    submit(hpo=ONE | {"trials": 6, "parallel": 6})
    request = LeaseRequest(worker="w", resources=Resources(cpus=1))

    async def scene(queue):
        callers = [
            Caller(key_id=f"key_{n}", scopes=frozenset({"work"}), project=None) for n in range(6)
        ]
        await asyncio.gather(*(queue.lease_runs(caller, request) for caller in callers))

    run_with_queue(api, scene)
    assert {actor for _, actor in read_log(api, type="run.leased")} == {
        f"key_{n}" for n in range(6)
    }
    with api.sessions() as session:
        assert len(set(session.scalars(select(Event.xid).where(Event.type == "run.leased")))) == 1


def test_what_a_round_mends_is_the_services_own_doing(api, submit, worker):
    submit(hpo=ONE)
    worker.lease_one()
    with api.sessions.begin() as session:
        session.execute(update(Run).values(lease_expires_at=func.now() - text("interval '1 s'")))
    worker.lease(1)
    assert read_log(api)[-2:] == [("lease.expired", "service"), ("run.queued", "service")]


@pytest.fixture
def run(api, database_url, settings, monkeypatch):
    """A function that runs a command on the database and returns its output."""
    url = database_url.render_as_string(hide_password=False)
    monkeypatch.setenv("WARMSCALE_DATABASE_URL", url)

    def invoke(*arguments, code=0):
        result = CliRunner().invoke(main.app, [*arguments, "--home", str(settings.home)])
        assert result.exit_code == code, result.output
        return result.stdout.strip() if code == 0 else result.output

    return invoke


def test_the_audit_log_is_read_by_a_command(api, run, key_of, study_spec):
    ana, client = key_of("write", "read")
    study = client.post("/v1/studies", study_spec(hpo=ONE))
    other = client.post("/v1/studies", study_spec(hpo=ONE))
    client.post(f"/v1/studies/{other['id']}/cancel")
    events = json.loads(run("db", "events", "--json"))
    assert [event["id"] for event in events] == sorted(event["id"] for event in events)
    assert len(events) >= 5
    of_study = json.loads(run("db", "events", "--json", "--study", study["name"]))
    assert [(event["type"], event["actor"], event["study_id"]) for event in of_study] == [
        ("study.created", ana, study["id"])
    ]
    assert of_study == json.loads(run("db", "events", "--json", "--study", study["id"]))
    assert [event in of_study for event in events].count(True) == 1
    keys = json.loads(run("db", "events", "--json", "--type", "key."))
    assert {event["type"] for event in keys} == {"key.created"}
    assert (
        json.loads(run("db", "events", "--json", "--actor", ana, "--limit", "1"))
        == [event for event in events if event["actor"] == ana][-1:]
    )
    line = run("db", "events", "--type", "study.cancelled")
    assert f"{ana}  study.cancelled  {other['id']}" in line
    assert "there is no study 'nowhere'" in run("db", "events", "--study", "nowhere", code=4)


def test_what_is_done_on_the_database_itself_is_the_operators(api, run):
    key = run("key", "create", "ci", "--scope", "read")
    with api.sessions() as session:
        id_ = session.scalars(select(ApiKey.id).where(ApiKey.name == "ci")).one()
    run("key", "revoke", id_)
    with api.sessions() as session:
        rows = session.execute(
            select(Event.type, Event.actor, Event.payload).where(
                Event.payload["key"].as_string() == id_
            )
        ).all()
    assert [(type_, actor) for type_, actor, _ in rows] == [
        ("key.created", "operator"),
        ("key.revoked", "operator"),
    ]
    assert rows[0].payload == {"key": id_, "name": "ci", "scopes": ["read"], "project": "default"}
    assert key not in str(rows)


def test_a_stream_shows_who(api, submit):
    study = submit(target=None)
    api.client.post(f"/v1/studies/{study['id']}/cancel")
    answer = api.client.request("GET", f"/v1/studies/{study['id']}/events").text
    with api.sessions() as session:
        mine = session.scalars(select(ApiKey.id).where(ApiKey.name == "tests")).one()
    assert answer.count(f'"actor":"{mine}"') == 2


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE warmscale.events SET actor = 'nobody'",
        "UPDATE warmscale.events SET payload = '{}' WHERE type = 'run.leased'",
        "DELETE FROM warmscale.events WHERE type = 'run.leased'",
        "DELETE FROM warmscale.events WHERE study_id IS NULL",
        "DELETE FROM warmscale.events",
    ],
)
def test_an_event_is_never_changed_or_deleted(api, submit, worker, change):
    submit(hpo=ONE)
    worker.lease_one()
    before = read_log(api)
    with pytest.raises(DBAPIError, match="append-only"), api.engine.begin() as connection:
        connection.execute(text(change))
    assert read_log(api) == before


@pytest.mark.tampers
def test_the_events_of_a_study_or_run_go_with_it_and_no_others(api, submit, worker):
    gone, stays = submit(hpo=ONE), submit(hpo=ONE)
    worker.lease_one(study=gone["id"])
    run = worker.lease_one(study=stays["id"])
    with api.sessions.begin() as session:
        session.execute(text("DELETE FROM warmscale.studies WHERE id = :id"), {"id": gone["id"]})
    assert read_log(api, study_id=gone["id"]) == []
    assert len(read_log(api, study_id=stays["id"])) == 3
    with api.sessions.begin() as session:
        session.execute(text("DELETE FROM warmscale.runs WHERE id = :id"), {"id": run.run_id})
    assert [type_ for type_, _ in read_log(api)] == ["study.created"]
    with api.sessions() as session:
        assert session.scalar(select(func.count()).where(Event.type == "key.created")) >= 1
