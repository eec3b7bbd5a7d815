"""Webhooks: signed, delivered at least once, and sent to private networks only if allowed."""

import asyncio
import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress

import httpx
import pytest
from sqlalchemy import create_engine, func, select, text, update
from sqlalchemy.orm import sessionmaker
from typer.testing import CliRunner

from service.cli import main
from service.database.tables import Delivery
from service.events import audit_log
from service.events.wakeups import Wakeups
from service.webhooks import addresses, outbox, sending, signing, store
from tests.service.webhooks.receiver import Receiver, is_signed

ONE = {"trials": 1, "parallel": 1, "sampler": "random", "pruner": "none"}


@pytest.fixture
def settings(settings):
    return settings.model_copy(update={"webhook_allow_private": True})


@pytest.fixture
def receiver():
    with Receiver() as receiver:
        yield receiver


@pytest.fixture
def soon(monkeypatch):
    """Retries after milliseconds in place of seconds."""
    monkeypatch.setattr(store, "_FIRST_SECONDS", 0.001)
    monkeypatch.setattr(store, "_FACTOR", 1.0)
    monkeypatch.setattr(outbox, "_POLL_SECONDS", 0.05)


@pytest.fixture
def sessions(database_url):
    engine = create_engine(database_url)
    yield sessionmaker(engine, expire_on_commit=False)
    engine.dispose()


def add_webhook(sessions, url, types=("run.succeeded",), project=None):
    with sessions.begin() as session:
        row, secret = store.add_webhook(session, url, list(types), project)
        return row.id, secret


def read_view(sessions, webhook_id):
    with sessions() as session:
        (view,) = [view for view in store.list_webhooks(session) if view.id == webhook_id]
    return view


def wait_until(seen, wanted, seconds=30):
    deadline = time.monotonic() + seconds
    while (found := seen()) != wanted:
        assert time.monotonic() < deadline, found
        time.sleep(0.02)


def fill_outbox(sessions, n, url):
    """Make a study with `n` waiting deliveries to a new webhook; return the webhook's id."""
    webhook_id, _ = add_webhook(sessions, url, ["study.failed"])
    with sessions.begin() as session:
        session.execute(text("INSERT INTO warmscale.studies (id, name, state, spec) "
                             "VALUES ('st_1', 's', 'active', '{}')"))  # fmt: skip
        for _ in range(n):
            audit_log.record_event(session, "study.failed", study_id="st_1")
    return webhook_id


def test_the_signature_is_the_one_of_the_convention():
    """The example of the Standard Webhooks specification."""
    secret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"  # noqa: S105 - the example's secret
    found = signing.sign_message(
        secret, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}'
    )
    assert found["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_the_end_of_a_run_and_of_its_study_arrive_signed(api, submit, worker, receiver):
    _, secret = add_webhook(api.sessions, receiver.url, ["run.succeeded", "study.completed"])
    study = submit(hpo=ONE, target=None)
    lease = worker.lease_one()
    worker.complete(lease, 1.5)
    receiver.wait_for(2)
    assert all(is_signed(secret, headers, body) for headers, body in receiver.seen)
    assert not any(is_signed(secret, headers, body + b" ") for headers, body in receiver.seen)
    sent = {message["type"]: message["data"] for message in receiver.messages()}
    run = sent["run.succeeded"]
    assert (run["run_id"], run["study"], run["kind"]) == (lease.run_id, study["name"], "trial")
    assert (run["val_loss_nats"], run["attempt"]) == (1.5, 1)
    assert sent["study.completed"]["study_id"] == study["id"]


def test_a_failure_is_tried_again_under_the_same_id_and_stays_signed(
    api, submit, worker, receiver, soon
):
    webhook_id, secret = add_webhook(api.sessions, receiver.url)
    receiver.answers = [500, 302, 200]
    submit(hpo=ONE, target=None)
    worker.complete(worker.lease_one())
    receiver.wait_for(3)
    wait_until(lambda: read_view(api.sessions, webhook_id).delivered, 1)
    assert len(set(receiver.ids())) == 1
    assert len({message["timestamp"] for message in receiver.messages()}) == 1
    assert all(is_signed(secret, headers, body) for headers, body in receiver.seen)


def test_what_fails_to_the_end_is_given_up_visibly_and_can_be_revived(
    api, submit, worker, receiver, soon, monkeypatch
):
    monkeypatch.setattr(store, "MAX_ATTEMPTS", 3)
    webhook_id, _ = add_webhook(api.sessions, receiver.url)
    receiver.answers = [500, 500, 500]
    submit(hpo=ONE, target=None)
    worker.complete(worker.lease_one())
    wait_until(lambda: read_view(api.sessions, webhook_id).dead, 1)
    assert (len(receiver.seen), read_view(api.sessions, webhook_id).last_error) == (
        3,
        "answered 500",
    )
    metrics = httpx.get(f"{api.url}/metrics", headers={"Authorization": f"Bearer {api.key}"}).text
    assert 'warmscale_webhook_deliveries{state="dead"} 1.0' in metrics
    with api.sessions.begin() as session:
        assert store.revive_deliveries(session, webhook_id) == 1
    wait_until(lambda: read_view(api.sessions, webhook_id).delivered, 1)


def test_the_delays_grow_to_a_day_at_most():
    delays = [store.delay_seconds(n) for n in range(1, store.MAX_ATTEMPTS)]
    assert 4 <= delays[0] <= 6
    assert all(1.5 < b / a < 5 for a, b in itertools.pairwise(delays))
    # A receiver that is away for a night still gets its events.
    assert 8 * 3600 < sum(delays) < 24 * 3600


def test_an_event_that_is_rolled_back_is_told_to_nobody(sessions, receiver):
    fill_outbox(sessions, 1, receiver.url)
    with sessions() as session:
        audit_log.record_event(session, "study.failed", study_id="st_1")
        assert session.scalar(select(func.count()).select_from(Delivery)) == 2
        session.rollback()
        assert session.scalar(select(func.count()).select_from(Delivery)) == 1


def test_a_webhook_hears_only_its_types_and_its_project(sessions, receiver):
    kinds = {
        "mine": (["study.failed"], "default"),
        "every": (["study.failed", "run.failed"], None),
        "other": (["study.failed"], "other"),
        "type": (["study.completed"], None),
    }
    ids = {name: add_webhook(sessions, receiver.url, *kind)[0] for name, kind in kinds.items()}
    fill_outbox(sessions, 1, receiver.url)
    waiting = {name for name, key in ids.items() if read_view(sessions, key).waiting}
    assert waiting == {"mine", "every"}


@pytest.mark.parametrize(("claim_seconds", "is_once"), [(store.CLAIM_SECONDS, True), (0.0, False)])
def test_two_replicas_deliver_each_once_because_claims_hold(
    sessions, receiver, monkeypatch, claim_seconds, is_once
):
    """Control: with claims of 0 s, deliveries are repeated."""
    monkeypatch.setattr(store, "CLAIM_SECONDS", claim_seconds)
    receiver.pause_seconds = 0.05
    webhook_id = fill_outbox(sessions, 24, receiver.url)

    async def run_replica():
        own = outbox.Outbox(sessions, allow_private=True)
        async with sending.make_client() as http:
            while await own.deliver_due(http) or read_view(sessions, webhook_id).waiting:
                pass

    async def run_both():
        await asyncio.gather(run_replica(), run_replica())

    asyncio.run(run_both())
    assert len(set(receiver.ids())) == 24
    assert (len(receiver.ids()) == 24) == is_once


def test_what_is_committed_is_delivered_though_the_api_is_killed_on_the_way(
    request, database_url, settings, sessions, receiver
):
    receiver.may_answer.clear()
    environment = os.environ | {
        "WARMSCALE_DATABASE_URL": database_url.render_as_string(hide_password=False),
        "WARMSCALE_HOME": str(settings.home),
        "WARMSCALE_PORT": "0",
        "WARMSCALE_WEBHOOK_ALLOW_PRIVATE": "true",
    }
    fill_outbox(sessions, 1, receiver.url)
    command = [sys.executable, "-m", "service.cli", "serve"]
    api = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    receiver.wait_for(1, seconds=60)
    api.send_signal(signal.SIGKILL)
    api.wait()
    receiver.may_answer.set()
    # The claim of the killed process expires after a minute; this makes it expire now.
    with sessions.begin() as session:
        assert session.scalar(select(Delivery.state)) == "waiting"
        session.execute(update(Delivery).values(next_at=func.now()))
    request.getfixturevalue("api")
    receiver.wait_for(2)
    assert len(set(receiver.ids())) == 1


# Loopback, private, link-local, shared, unspecified, multicast and broadcast addresses, then IPv6
# addresses that embed an IPv4 address of these, and the range for documentation.
PRIVATE = [
    "127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1",
    "0.0.0.0",  # noqa: S104
    "224.0.0.1", "255.255.255.255", "::1", "::", "fe80::1", "fe80::1%eth0", "fd00::1", "ff02::1",
    "::ffff:127.0.0.1", "::ffff:169.254.169.254", "64:ff9b::a00:1", "2002:7f00:1::", "2001:db8::1",
]  # fmt: skip


@pytest.mark.parametrize("address", PRIVATE)
def test_an_address_of_a_private_network_is_not_public(address):
    assert not addresses.is_public(address)


@pytest.mark.parametrize(
    "address", ["93.184.216.34", "2606:4700::1111", "::ffff:93.184.216.34", "64:ff9b::808:808"]
)
def test_an_address_of_the_internet_is_public(address):
    assert addresses.is_public(address)


@pytest.mark.parametrize(
    "url",
    ["ftp://a/b", "file:///etc/passwd", "http://", "http://u:p@a/", "http://a:x/", "http://a:0/",
     "//a/b", "", "http://a/ b", "http://[::1", "gopher://a", f"http://{'a' * 64}.example/",
     "http://a..b/", "http://[fe80::ü]/"],
)  # fmt: skip
def test_what_is_no_plain_web_url_is_refused(url):
    with pytest.raises(addresses.ForbiddenURLError):
        addresses.parse_url(url)


@pytest.mark.parametrize(
    ("url", "netloc"),
    [("https://bücher.example/x", "xn--bcher-kva.example"), ("http://ü.de:81/", "xn--tda.de:81"),
     ("http://[::1]:8/", "[::1]:8"), ("http://a.example", "a.example")],
)  # fmt: skip
def test_a_host_is_written_as_resolvers_and_certificates_have_it(url, netloc):
    assert addresses.parse_url(url).netloc == netloc


def test_whatever_goes_wrong_on_the_way_is_that_delivery_s_failure(receiver, monkeypatch):
    async def broken(*_, **__):
        raise KeyError(receiver.url)

    monkeypatch.setattr(sending, "resolve_address", broken)
    assert send_message(receiver.url) == "not reached: KeyError"


def test_the_outbox_goes_on_after_any_exception(sessions, receiver, monkeypatch, caplog):
    """Control: `deliver_due` itself raises the exception."""
    own, healthy = outbox.Outbox(sessions, allow_private=True), store.settle_delivery
    webhook_id = fill_outbox(sessions, 1, receiver.url)

    def broken(*_):
        monkeypatch.setattr(store, "settle_delivery", healthy)
        raise KeyError("unforeseen")

    async def until_delivered():
        monkeypatch.setattr(store, "settle_delivery", broken)
        with pytest.raises(KeyError):
            async with sending.make_client() as http:
                await own.deliver_due(http)
        monkeypatch.setattr(store, "settle_delivery", broken)
        async with own.keep_delivering(Wakeups(sessions.kw["bind"].url)):
            await asyncio.to_thread(wait_until, count_states(sessions, webhook_id), (0, 1, 0))

    monkeypatch.setattr(outbox, "_POLL_SECONDS", 0.05)
    monkeypatch.setattr(store, "CLAIM_SECONDS", 0.0)
    asyncio.run(until_delivered())
    assert "webhook deliveries are delayed" in caplog.text


def test_the_outbox_begins_again_where_its_client_cannot_be_made(
    sessions, receiver, monkeypatch, caplog
):
    """For example while the file of SSL_CERT_FILE does not exist yet."""
    own, healthy = outbox.Outbox(sessions, allow_private=True), outbox.make_client
    webhook_id = fill_outbox(sessions, 1, receiver.url)

    def broken():
        monkeypatch.setattr(outbox, "make_client", healthy)
        raise FileNotFoundError("certificates")

    async def until_delivered():
        async with own.keep_delivering(Wakeups(sessions.kw["bind"].url)):
            await asyncio.to_thread(wait_until, count_states(sessions, webhook_id), (0, 1, 0))

    monkeypatch.setattr(outbox, "make_client", broken)
    monkeypatch.setattr(outbox, "_POLL_SECONDS", 0.05)
    asyncio.run(until_delivered())
    assert "webhook deliveries are delayed" in caplog.text


def count_states(sessions, webhook_id):
    def counts():
        view = read_view(sessions, webhook_id)
        return view.waiting, view.delivered, view.dead

    return counts


def deliver_to_the_end(sessions):
    """Run more rounds than a delivery has attempts."""
    own = outbox.Outbox(sessions, allow_private=True)

    async def run_rounds():
        async with sending.make_client() as http:
            for _ in range(20):
                with suppress(KeyError):
                    await own.deliver_due(http)

    asyncio.run(run_rounds())


@pytest.mark.parametrize("broken", ["message", "note"])
def test_what_fails_outside_of_sending_is_an_attempt_and_comes_to_an_end(
    sessions, receiver, monkeypatch, soon, broken
):
    """The other deliveries of the same round are sent."""
    monkeypatch.setattr(store, "MAX_ATTEMPTS", 3)
    monkeypatch.setattr(store, "CLAIM_SECONDS", 0.0)
    webhook_id = fill_outbox(sessions, 3, receiver.url)
    with sessions() as session:
        bad = session.scalar(select(func.min(Delivery.event_id)))

    def fails_for_one(healthy, event_of):
        def call(*arguments):
            if event_of(*arguments) == bad:
                raise KeyError("unforeseen")
            return healthy(*arguments)

        return call

    if broken == "message":
        broken_encode = fails_for_one(outbox.encode_body, lambda body: body["data"]["event_id"])
        monkeypatch.setattr(outbox, "encode_body", broken_encode)
    else:
        broken_settle = fails_for_one(
            store.settle_delivery, lambda _, delivery, __: delivery.event_id
        )
        monkeypatch.setattr(store, "settle_delivery", broken_settle)
    deliver_to_the_end(sessions)
    view = read_view(sessions, webhook_id)
    assert (view.waiting, view.delivered, view.dead) == (0, 2, 1)
    assert len([i for i in receiver.ids() if f"_{bad}_" in i]) == (0 if broken == "message" else 3)
    assert view.last_error == (
        "not written: KeyError"
        if broken == "message"
        else "the outcome of its attempts could not be stored"
    )


def send_message(url, *, allow_private=False, **more):
    async def send_once():
        async with sending.make_client() as http:
            secret = signing.create_secret()
            return await sending.send_message(
                http, url, secret=secret, message_id="m", body=b"{}",
                allow_private=allow_private, **more,
            )  # fmt: skip

    return asyncio.run(send_once())


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::ffff:127.0.0.1]", "2130706433"])
def test_nothing_is_sent_into_a_private_network_however_it_is_spelled(receiver, host):
    error = send_message(f"http://{host}:{receiver.port}/hook")
    assert error.startswith("refused")
    assert receiver.seen == []


def test_a_name_is_connected_to_at_the_address_that_was_checked(receiver, monkeypatch):
    # The name resolves to another address the second time: only the first may be used.
    asked = []

    async def resolved(_loop, host, port, **_):
        asked.append(host)
        kind = (socket.AF_INET, socket.SOCK_STREAM, 6, "")
        return [(*kind, ("127.0.0.1" if len(asked) == 1 else "192.0.2.1", port))]

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", resolved)
    assert send_message(f"http://hooks.example:{receiver.port}/x?y=1", allow_private=True) is None
    assert asked == ["hooks.example"]
    assert receiver.seen[0][0]["Host"] == f"hooks.example:{receiver.port}"
    asked.clear()
    assert send_message(f"http://hooks.example:{receiver.port}/x").startswith("refused")


def test_a_receiver_that_does_not_answer_is_given_up_in_time(receiver):
    receiver.may_answer.clear()
    assert (
        send_message(receiver.url, allow_private=True, timeout_seconds=0.3)
        == "no answer within 0.3 s"
    )


def test_a_receiver_that_is_not_there_is_a_failure_in_a_word(receiver):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert (
        send_message(f"http://127.0.0.1:{port}/", allow_private=True) == "not reached: ConnectError"
    )


def test_the_command_line_shows_the_secret_once(database_url, settings, receiver, monkeypatch):
    url = database_url.render_as_string(hide_password=False)
    monkeypatch.setenv("WARMSCALE_DATABASE_URL", url)
    monkeypatch.setenv("WARMSCALE_WEBHOOK_ALLOW_PRIVATE", "true")

    def run(*arguments):
        return CliRunner().invoke(main.app, ["webhook", *arguments, "--home", str(settings.home)])

    secret = run("add", receiver.url, "--events", "run.failed").stdout.strip()
    assert secret.startswith("whsec_")
    listed = run("list", "--json").stdout
    assert (secret in listed, receiver.url in listed) == (False, True)
    webhook_id = listed.split('"id": "')[1].split('"')[0]
    assert run("test", webhook_id).exit_code == 0
    assert is_signed(secret, *receiver.seen[0])
    assert receiver.messages()[0]["type"] == "webhook.test"
    assert run("add", "file:///etc/passwd").exit_code == 2
    assert "run.failed" in run("add", receiver.url, "--events", "nothing").output
    assert run("remove", webhook_id).exit_code == 0
    assert run("remove", webhook_id).exit_code == 4
