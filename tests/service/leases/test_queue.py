"""The lease queue: requests share a commit, an idle queue reads nothing, no grant is lost."""

import asyncio
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import httpx
import pytest
from sqlalchemy import select, text
from sqlalchemy.exc import InternalError

from service.app import create_app
from service.database.tables import Event, Run
from service.leases import new_trials
from service.leases import queue as lease_queue
from service.leases import rounds as lease_rounds
from service.leases.queue import LeaseQueue
from service.leases.requests import Granted
from service.problems import Problem
from service.protocol import LeaseRequest, Resources
from service.studies.locks import lock_study
from service.web.services import find_service
from tests.by_hand import EVERYWHERE, Worker, run_with_queue
from tests.conftest import make_settings, serve_api

OPEN = {"trials": 24, "parallel": 24, "sampler": "tpe", "pruner": "none"}
LONG = 20.0


@pytest.fixture
def rounds(monkeypatch):
    """The number of requests of each round."""
    sizes, serve_round = [], lease_rounds.serve_round

    def counted(*arguments):
        sizes.append(len(arguments[-1]))
        return serve_round(*arguments)

    monkeypatch.setattr(lease_rounds, "serve_round", counted)
    return sizes


def request(**more):
    return LeaseRequest(worker="by-hand", resources=Resources(cpus=1), **more)


def test_who_asks_at_once_is_served_by_one_commit(api, submit, rounds):
    submit(hpo=OPEN)

    async def scene(queue):
        return await asyncio.gather(*(queue.lease_runs(EVERYWHERE, request()) for _ in range(16)))

    numbers = [lease.trial_number for (lease,) in run_with_queue(api, scene)]
    # In the order of arrival, and in a single transaction.
    assert numbers == list(range(16))
    assert rounds == [16]
    with api.sessions() as session:
        leased = session.scalars(select(Event.xid).where(Event.type == "run.leased")).all()
        params = session.scalars(select(Run.params["lr"].as_float())).all()
    assert (len(leased), len(set(leased))) == (16, 1)
    assert len(set(params)) == 16


def test_nothing_is_asked_of_the_database_while_nothing_happens(api, submit, rounds):
    async def scene(queue):
        waiting = [
            asyncio.create_task(queue.lease_runs(EVERYWHERE, request(wait_seconds=LONG)))
            for _ in range(20)
        ]
        await asyncio.sleep(1)
        before = len(rounds)
        await asyncio.sleep(1.5)
        # The poll every five seconds may fall into this time.
        assert len(rounds) - before <= 1
        await asyncio.to_thread(submit, hpo=OPEN)
        return await asyncio.gather(*waiting)

    begun = time.monotonic()
    assert sorted(lease.trial_number for (lease,) in run_with_queue(api, scene)) == [*range(20)]
    assert time.monotonic() - begun < LONG


def test_a_retry_is_granted_when_it_is_due_without_a_notice(
    api, submit, worker, rounds, monkeypatch
):
    monkeypatch.setattr(lease_queue, "_POLL_SECONDS", LONG)
    submit(hpo=OPEN | {"trials": 1})
    # The failed run is due again in 1 s, and no notification says that it is.
    worker.finish(worker.lease_one(), "failed", error="boom")
    begun = time.monotonic()
    (again,) = worker.lease(1, wait_seconds=LONG)
    assert again.attempt == 2
    assert time.monotonic() - begun < LONG / 2
    assert len(rounds) <= 6


def test_a_request_that_failed_tells_its_own_client_and_no_other(api, submit):
    submit(hpo=OPEN)

    async def scene(queue):
        asked = [
            queue.lease_runs(EVERYWHERE, request(study="typo")),
            queue.lease_runs(EVERYWHERE, request()),
        ]
        return await asyncio.gather(*asked, return_exceptions=True)

    typo, served = run_with_queue(api, scene)
    assert "typo" in str(typo)
    assert len(served) == 1


def test_when_the_database_is_away_everybody_in_the_round_hears_it(api, submit, monkeypatch):
    def away(*_):
        raise OSError("away")

    monkeypatch.setattr(lease_rounds, "expire_leases", away)

    async def scene(queue):
        asked = [queue.lease_runs(EVERYWHERE, request(wait_seconds=LONG)) for _ in range(3)]
        return await asyncio.gather(*asked, return_exceptions=True)

    assert [str(error) for error in run_with_queue(api, scene)] == ["away"] * 3


def test_who_left_before_its_turn_is_granted_nothing(api, submit, monkeypatch):
    submit(hpo=OPEN)
    draw = api.sampler.sample_trials

    async def scene(queue):
        # The client leaves while its trial is being sampled.
        def leaves(*arguments):
            loop.call_soon_threadsafe(gone.cancel)
            time.sleep(0.2)
            return draw(*arguments)

        monkeypatch.setattr(api.sampler, "sample_trials", leaves)
        loop = asyncio.get_running_loop()
        gone, stays = (
            asyncio.create_task(queue.lease_runs(EVERYWHERE, request())) for _ in range(2)
        )
        return await asyncio.gather(gone, stays, return_exceptions=True)

    gone, stays = run_with_queue(api, scene)
    assert isinstance(gone, asyncio.CancelledError)
    assert [lease.trial_number for lease in stays] == [0]
    with api.sessions() as session:
        assert session.scalar(text("SELECT count(*) FROM warmscale.runs")) == 1


def test_a_waiting_client_that_hangs_up_leaves_the_line(api, submit, worker):
    body = LeaseRequest(worker="gone", wait_seconds=60).model_dump_json()
    head = f"POST /v1/leases HTTP/1.1\r\nHost: test\r\nAuthorization: Bearer {api.key}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    queue = find_service(api.app, LeaseQueue)
    with socket.create_connection(("127.0.0.1", httpx.URL(api.url).port)) as client:
        client.sendall((head + body).encode())
        wait_until(lambda: any(w.pending.request.worker == "gone" for w in queue._waiting))
        waiting = list(queue._waiting)
    wait_until(lambda: all(w.answer.done() for w in waiting))
    submit(hpo=OPEN)
    assert worker.lease_one().trial_number == 0


def wait_until(condition):
    deadline = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_replica_waits_for_the_row_that_another_holds(api, submit, worker):
    study = submit(hpo=OPEN)
    with api.sessions() as other, ThreadPoolExecutor(1) as pool:
        lock_study(other, study["id"])
        asked = pool.submit(worker.lease, 1)
        time.sleep(0.5)
        assert not asked.done()
        other.commit()
        assert len(asked.result(LONG)) == 1


def test_a_replica_does_not_wait_for_ever_and_looks_again(api, submit, worker, monkeypatch):
    monkeypatch.setattr(new_trials, "_LOCK_TIMEOUT", "100ms")
    study = submit(hpo=OPEN)
    with api.sessions() as other, ThreadPoolExecutor(1) as pool:
        lock_study(other, study["id"])
        assert worker.lease(1) == ()
        waiting = pool.submit(worker.lease, 1, wait_seconds=LONG)
        time.sleep(0.5)
        other.commit()
        assert len(waiting.result(LONG)) == 1


def test_work_that_one_replica_commits_wakes_who_waits_at_another(
    api, submit, database_url, tmp_path, monkeypatch
):
    monkeypatch.setattr(lease_queue, "_POLL_SECONDS", LONG)
    with (
        serve_api(make_settings(tmp_path), database_url) as other,
        ThreadPoolExecutor(1) as pool,
    ):
        waiting = pool.submit(Worker(other.client).lease, 1, wait_seconds=LONG)
        time.sleep(0.5)
        begun = time.monotonic()
        submit(hpo=OPEN)
        assert len(waiting.result(LONG)) == 1
        assert time.monotonic() - begun < LONG / 2


def test_what_the_database_refuses_ends_no_study(api, submit, worker, monkeypatch):
    """A replica that was suspended may have lost its session: that is no fault of the study."""
    name = submit(hpo=OPEN)["name"]
    written = new_trials.write_drafts

    # PostgreSQL ends the session of the first write.
    def ended(session, drawn):
        monkeypatch.setattr(new_trials, "write_drafts", written)
        raise InternalError("INSERT", {}, Exception("idle-in-transaction timeout"))

    monkeypatch.setattr(new_trials, "write_drafts", ended)
    (lease,) = worker.lease(1, wait_seconds=LONG)
    assert lease.trial_number == 0
    assert api.client.get(f"/v1/studies/{name}")["state"] == "active"


def test_a_run_that_only_a_newer_version_can_read_holds_up_no_other(api, submit, worker):
    one = submit(hpo=OPEN | {"trials": 1})
    newer, other = worker.lease_one(), submit(hpo=OPEN | {"trials": 1})
    older = worker.lease_one()
    worker.finish(newer, "released")
    worker.finish(older, "released")
    with api.sessions.begin() as session:
        run = session.get(Run, newer.run_id)
        run.spec = run.spec | {"of_tomorrow": 1}
    (lease,) = worker.lease(1)
    assert (lease.run_id, lease.study_id) == (older.run_id, other["id"])
    assert api.client.get(f"/v1/studies/{one['name']}")["state"] == "active"


@pytest.mark.tampers
def test_a_study_that_is_held_holds_up_no_other(api, submit, worker):
    """Another transaction holds the study's row: its trials and its late leases are skipped."""
    held, free = submit(hpo=OPEN), submit(hpo=OPEN)
    late = worker.lease_one(study=held["name"])
    with api.sessions.begin() as session:
        session.execute(
            text("UPDATE warmscale.runs SET lease_expires_at = now() - interval '1 hour'")
        )
    with api.sessions() as session:
        lock_study(session, held["id"])
        begun = time.monotonic()
        assert len(worker.lease(1, study=free["name"], wait_seconds=LONG)) == 1
        assert time.monotonic() - begun < LONG / 2
    assert worker.lease_one(study=held["name"], wait_seconds=LONG).run_id != late.run_id


def test_what_is_answered_as_the_client_leaves_is_given_back(api, submit):
    submit(hpo=OPEN | {"trials": 1})

    async def scene(queue):
        asked, answer_if_ready = None, queue._answer_if_ready

        # The client leaves between the answer and its delivery.
        def answer_and_leave(entry):
            answer_if_ready(entry)
            if entry.answer.done():
                queue._answer_if_ready = answer_if_ready
                asked.cancel()

        queue._answer_if_ready = answer_and_leave
        asked = asyncio.create_task(queue.lease_runs(EVERYWHERE, request(wait_seconds=LONG)))
        with pytest.raises(asyncio.CancelledError):
            await asked
        return await queue.lease_runs(EVERYWHERE, request(wait_seconds=LONG))

    (again,) = run_with_queue(api, scene)
    assert again.attempt == 2
    with api.sessions() as session:
        assert session.get(Run, again.run_id).failures == 0


def test_who_stays_is_answered_before_what_others_left_is_given_back(api, submit, monkeypatch):
    submit(hpo=OPEN)
    serve_round, release_leases = lease_rounds.serve_round, lease_queue.release_leases
    may = threading.Event()

    def slowly(*arguments):
        assert may.wait(LONG)
        release_leases(*arguments)

    monkeypatch.setattr(lease_queue, "release_leases", slowly)

    async def scene(queue):
        loop = asyncio.get_running_loop()

        # The first client leaves after its grant has committed and before it is answered.
        def first_leaves(services, requests):
            steps = serve_round(services, requests)
            while isinstance(step := lease_queue._run_to_next_step(steps), Granted):
                if requests[0].granted:
                    loop.call_soon_threadsafe(asked[0].cancel)
                    wait_until(lambda: requests[0].is_closed)
                yield step
            return step

        monkeypatch.setattr(lease_rounds, "serve_round", first_leaves)
        asked = [asyncio.create_task(queue.lease_runs(EVERYWHERE, request())) for _ in range(2)]
        ((one,),) = await asyncio.gather(asyncio.wait_for(asked[1], LONG / 2))
        may.set()
        monkeypatch.setattr(lease_rounds, "serve_round", serve_round)
        (again,) = await queue.lease_runs(EVERYWHERE, request(wait_seconds=LONG, max_runs=1))
        return one, again

    one, again = run_with_queue(api, scene)
    assert (one.trial_number, one.attempt) == (1, 1)
    assert again.run_id != one.run_id


def test_the_end_of_a_replica_waits_for_what_it_gives_back(
    settings, api, submit, worker, monkeypatch
):
    """Otherwise a lease without a worker expires, which counts as a failure."""
    submit(hpo=OPEN | {"trials": 1})
    lease, release_leases = worker.lease_one(), lease_queue.release_leases
    app = create_app(settings, api.engine.url)

    def slowly(*arguments):
        time.sleep(0.5)
        release_leases(*arguments)

    monkeypatch.setattr(lease_queue, "release_leases", slowly)

    async def live_and_end():
        async with app.router.lifespan_context(app):
            find_service(app, LeaseQueue)._start_release(EVERYWHERE, (lease,))
        with api.sessions() as session:
            return session.get(Run, lease.run_id).state

    assert asyncio.run(live_and_end()) == "queued"


def test_who_stands_in_line_hears_of_a_failure_between_rounds(api, monkeypatch, caplog):
    pause = LeaseQueue._pause

    async def broken(*_):
        monkeypatch.setattr(LeaseQueue, "_pause", pause)
        raise KeyError("unforeseen")

    monkeypatch.setattr(LeaseQueue, "_pause", broken)

    async def scene(queue):
        asked = (queue.lease_runs(EVERYWHERE, request(wait_seconds=LONG)) for _ in range(2))
        failed = await asyncio.gather(*asked, return_exceptions=True)
        return failed, await queue.lease_runs(EVERYWHERE, request())

    failed, after = run_with_queue(api, scene)
    assert [type(error) for error in failed] == [KeyError] * 2
    assert after == ()
    assert "rounds" in caplog.text


@pytest.mark.parametrize("first", ["queued", "trial"])
def test_what_is_granted_is_answered_before_more_is_drawn(api, submit, worker, monkeypatch, first):
    """Sampling may take minutes, and a lease runs from its grant."""
    early = submit(hpo=OPEN | {"trials": 1})
    if first == "queued":
        worker.finish(worker.lease_one(), "released")
    slow = submit(hpo=OPEN)
    draw, answered = api.sampler.sample_trials, threading.Event()

    # The second study is sampled only after the first request has its answer.
    def waits_for_the_answer(name, *arguments):
        assert name == early["name"] or answered.wait(LONG)
        return draw(name, *arguments)

    monkeypatch.setattr(api.sampler, "sample_trials", waits_for_the_answer)

    async def scene(queue):
        asked = [asyncio.create_task(queue.lease_runs(EVERYWHERE, request())) for _ in range(3)]
        leases = await asked[0]
        answered.set()
        return [leases, *await asyncio.gather(*asked[1:])]

    begun = time.monotonic()
    studies = [lease.study_id for (lease,) in run_with_queue(api, scene)]
    assert studies == [early["id"], slow["id"], slow["id"]]
    assert time.monotonic() - begun < LONG


def test_a_round_serves_so_many_and_the_next_who_stands_behind_them(
    api, submit, rounds, monkeypatch
):
    monkeypatch.setattr(lease_queue, "_MAX_PER_ROUND", 4)
    submit(hpo=OPEN)
    nothing = request(wait_seconds=LONG, kinds=("target",))

    async def scene(queue):
        idle = [asyncio.create_task(queue.lease_runs(EVERYWHERE, nothing)) for _ in range(5)]
        try:
            return await asyncio.gather(
                *(queue.lease_runs(EVERYWHERE, request()) for _ in range(6))
            )
        finally:
            for one in idle:
                one.cancel()

    numbers = [lease.trial_number for (lease,) in run_with_queue(api, scene)]
    assert numbers == [*range(6)]
    # Eleven requests: the third round takes the three behind the first eight.
    assert rounds[:3] == [4, 4, 3]


def test_a_key_has_its_share_of_the_line_and_no_more(api, submit):
    other = replace(EVERYWHERE, key_id="other")

    async def scene(queue):
        waiting = [
            asyncio.create_task(queue.lease_runs(EVERYWHERE, request(wait_seconds=LONG)))
            for _ in range(3)
        ]
        await asyncio.sleep(0.1)
        with pytest.raises(Problem) as refused:
            await queue.lease_runs(EVERYWHERE, request())
        assert await queue.lease_runs(other, request()) == ()
        waiting.pop().cancel()
        await asyncio.sleep(0.1)
        assert await queue.lease_runs(EVERYWHERE, request()) == ()
        for one in waiting:
            one.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        return refused.value, queue._limit._calls_of_key

    refused, of_key = run_with_queue(api, scene, max_waiting_leases=3)
    assert (refused.status, refused.kind) == (429, "too-many-waiting")
    assert refused.headers == {"Retry-After": "1"}
    assert not of_key


def test_a_trial_that_optuna_numbers_meanwhile_gets_no_second_of_its_number(api, submit, worker):
    """Optuna numbers trials under its study's lock; a user may add trials beside the service."""
    name = submit(hpo=OPEN)["name"]
    optuna_id = api.sampler.storage.get_study_id_from_name(name)
    with ThreadPoolExecutor(1) as pool:
        with api.engine.begin() as theirs:
            query = "SELECT FROM optuna.studies WHERE study_id = :study FOR UPDATE"
            theirs.execute(text(query), {"study": optuna_id})
            lease = pool.submit(worker.lease_one)
            time.sleep(0.3)
            assert not lease.done()
            theirs.execute(
                text(
                    "INSERT INTO optuna.trials (study_id, number, state)"
                    " VALUES (:study, 0, 'WAITING')"
                ),
                {"study": optuna_id},
            )
        lease.result(LONG)
    with api.sessions() as session:
        numbers = session.scalars(text("SELECT number FROM optuna.trials ORDER BY number")).all()
    assert len(set(numbers)) == len(numbers)
