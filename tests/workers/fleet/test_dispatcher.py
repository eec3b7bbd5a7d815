"""The dispatcher's loop alone, on an engine that records its calls."""

import threading
import time
from concurrent.futures import Future
from unittest.mock import Mock

import pytest
from ray.exceptions import RaySystemError, TaskCancelledError, WorkerCrashedError

from service.client import Client
from service.protocol import Resources
from workers.failures import UnrunnableError
from workers.fleet import dispatcher as dispatching
from workers.fleet.dispatcher import Dispatcher, DispatcherOptions
from workers.fleet.ray_engine import Engine
from workers.fleet.service_link import FleetRefusedError

_LONG_SECONDS = 90.0  # other processes may keep the machine busy


class _Handle:
    def __init__(self) -> None:
        self.future: Future[str] = Future()
        self.drained = False
        self.is_queued = False

    def drain(self) -> None:
        self.drained = True
        if self.is_queued:
            self.future.set_exception(TaskCancelledError())

    def kill(self) -> None:
        if not self.future.done():
            self.future.set_exception(WorkerCrashedError())


class _Engine:
    def __init__(self) -> None:
        self.submitted: dict[str, _Handle] = {}
        self.refusal: Exception | None = None
        self.num_freed = 0
        self.is_full = False

    def has_begun(self, handle: _Handle) -> bool:
        return not handle.is_queued

    def free_groups(self) -> None:
        self.num_freed += 1

    def list_nodes(self) -> dict[str, Resources]:
        return {"a": Resources(cpus=1), "b": Resources(cpus=2)}

    def list_free(self) -> dict[str, Resources]:
        return self.list_nodes()

    def submit_lease(self, lease, node, connection, checkpoint_seconds) -> _Handle:
        if self.refusal is not None:
            raise self.refusal
        self.submitted[lease.run_id] = _Handle()
        self.submitted[lease.run_id].is_queued = self.is_full
        return self.submitted[lease.run_id]


@pytest.fixture
def engine() -> _Engine:
    return _Engine()


@pytest.fixture
def start(engine, url):
    """Run a dispatcher on another thread; the future holds None or the exception."""
    threads, dispatchers = [], []

    def start(**options) -> tuple[Dispatcher, Future]:
        options = {"drain_seconds": 0.2} | options
        dispatcher = Dispatcher(
            engine, DispatcherOptions(url=url, api_key="key", name="fleet", **options)
        )
        result: Future = Future()

        def work() -> None:
            try:
                result.set_result(dispatcher.run())
            except Exception as error:  # noqa: BLE001 - the result
                result.set_exception(error)

        threads.append(threading.Thread(target=work))
        dispatchers.append(dispatcher)
        threads[-1].start()
        return dispatcher, result

    yield start
    for dispatcher, thread in zip(dispatchers, threads, strict=True):
        dispatcher.drain()
        thread.join()


def test_a_refused_fleet_drains_and_says_why(fake, start) -> None:
    fake.key = "another"
    _, result = start()
    with pytest.raises(FleetRefusedError, match="key is unknown"):
        result.result(_LONG_SECONDS)


def test_a_fleet_outlives_a_service_that_is_away(fake, engine, start, make_spec) -> None:
    fake.away = True
    # The first request fails at once; the fleet then pauses for 1 s and must not exit.
    _, result = start(exit_when_idle_seconds=60)
    time.sleep(0.5)
    assert not result.done()
    fake.away = False
    run = fake.offer(make_spec())
    fake.wait_for(lambda: run.leased_at)


def test_a_fleet_asks_again_after_an_answer_that_nobody_foresaw(
    fake, start, make_spec, monkeypatch
) -> None:
    lease, broken = Client.lease, iter([True])

    def breaking_once(client, request):
        return 1 / 0 if next(broken, False) else lease(client, request)

    monkeypatch.setattr(Client, "lease", breaking_once)
    start(exit_when_idle_seconds=60)
    run = fake.offer(make_spec())
    fake.wait_for(lambda: run.leased_at)


@pytest.mark.parametrize(
    ("refusal", "retryable"), [(UnrunnableError("no such GPU"), False), (RaySystemError("x"), True)]
)
def test_a_run_that_ray_refuses_fails_alone(
    fake, engine, start, make_spec, refusal, retryable
) -> None:
    engine.refusal = refusal
    run = fake.offer(make_spec())
    start()
    fake.wait_for(lambda: run.finish)
    assert (run.finish.outcome, run.finish.retryable) == ("failed", retryable)
    engine.refusal = None
    other = fake.offer(make_spec())
    fake.wait_for(lambda: other.leased_at)


def test_resources_that_ray_does_not_know_are_no_run_s_on_any_fleet(fake, make_spec) -> None:
    lease = fake.leased(make_spec()).lease
    # Ray counts GPUs in ten-thousandths and refuses a smaller share.
    lease = lease.model_copy(update={"resources": Resources.model_construct(cpus=1, gpus=1e-5)})
    with pytest.raises(UnrunnableError, match="num_gpus"):
        Engine.submit_lease(Mock(), lease, "0" * 56, Mock(), 1.0)


def test_an_idle_fleet_exits_after_as_long_as_it_was_told(fake, start) -> None:
    started = time.monotonic()
    _, result = start(exit_when_idle_seconds=0.5)
    result.result(_LONG_SECONDS)
    assert time.monotonic() - started >= 0.5


def test_only_one_nodes_resources_are_offered_at_a_time(fake, engine, start, make_spec) -> None:
    # The nodes have 1 and 2 CPUs. Together they would fit a run of 2 and half of the second run.
    runs = [fake.offer(make_spec(), cpus=2) for _ in range(2)]
    _, _ = start()
    fake.wait_for(lambda: any(run.leased_at for run in runs))
    fake.wait_for(lambda: len(fake.requests) > 3)
    assert sum(run.leased_at is not None for run in runs) == 1
    assert max(request.resources.cpus for request in fake.requests) == 2


def test_a_lease_that_arrives_while_draining_is_given_back(
    fake, engine, start, make_spec, monkeypatch
) -> None:
    monkeypatch.setattr(dispatching, "_IDLE_WAIT_SECONDS", 30.0)  # the poll lasts until the offer
    monkeypatch.setattr(dispatching, "_KILLED_SECONDS", _LONG_SECONDS)
    dispatcher, result = start()
    fake.wait_for(lambda: fake.requests)
    # The pending request is a long poll: the offer answers it after the drain began.
    dispatcher.drain()
    time.sleep(0.2)
    run = fake.offer(make_spec())
    fake.wait_for(lambda: run.finish)
    assert run.finish.outcome == "released"
    assert engine.submitted == {}
    result.result(_LONG_SECONDS)


def test_a_run_that_does_not_drain_is_killed_and_given_back(fake, engine, start, make_spec) -> None:
    run = fake.offer(make_spec())
    dispatcher, result = start(drain_seconds=0.5)
    _wait_until_submitted(engine, run)
    dispatcher.drain()
    result.result(_LONG_SECONDS)
    assert engine.submitted[run.id].drained
    assert run.finish.outcome == "released"


def test_a_run_that_waits_in_ray_is_given_back_before_its_lease_runs_out(
    fake, engine, start, make_spec
) -> None:
    # The run waits in Ray's queue: the fleet gives it back after half of its lease, 4 s.
    engine.is_full = True
    run = fake.offer(make_spec(), lease_seconds=8.0)
    start(exit_when_idle_seconds=60)
    fake.wait_for(lambda: run.finish)
    assert (run.finish.outcome, run.failures) == ("released", 0)
    engine.is_full = False
    fake.wait_for(lambda: run.attempt > 1)


def test_a_run_that_has_begun_is_left_alone(fake, engine, start, make_spec) -> None:
    run = fake.offer(make_spec(), lease_seconds=0.3)
    start(exit_when_idle_seconds=60)
    _wait_until_submitted(engine, run)
    # Longer than the lease, which nothing renews here: only a waiting run may be given back.
    time.sleep(1)
    assert not engine.submitted[run.id].drained


def test_what_a_failed_group_holds_is_freed_once_no_other_group_runs(
    fake, engine, start, make_spec
) -> None:
    start(exit_when_idle_seconds=60)
    first = fake.offer(make_spec(), cpus=2, processes=2)
    fake.wait_for(lambda: first.leased_at)
    alone = fake.offer(make_spec())
    fake.wait_for(lambda: alone.leased_at)
    _crash(engine, alone)
    fake.wait_for(lambda: alone.finish)
    # Freeing the groups now would also free the group that still runs.
    assert engine.num_freed == 0
    _crash(engine, first)
    fake.wait_for(lambda: first.finish)
    assert engine.num_freed == 1


def _wait_until_submitted(engine, run) -> None:
    while run.id not in engine.submitted:
        time.sleep(0.01)


def _crash(engine, run) -> None:
    _wait_until_submitted(engine, run)
    engine.submitted[run.id].future.set_exception(WorkerCrashedError())
