import itertools
import threading
import time

import pytest

from service.client import Client, StaleLeaseError
from service.protocol import Measurement
from workers.attempt.reporter import Reporter


def _point(step: int, evaluation: int | None = None) -> Measurement:
    return Measurement(step=step, tokens=step * 128, loss_nats=1.0, evaluation=evaluation)


def test_measurements_arrive_in_order_and_in_batches(fake, client, make_spec) -> None:
    run = fake.leased(make_spec())
    with Reporter(client, run.lease, period_seconds=30.0) as reporter:  # only `flush` sends
        for step in range(2_500):
            reporter.add_measurement(_point(step))
        reporter.flush()
    assert [m.step for m in run.curve] == list(range(2_500))
    assert all(len(batch.measurements) <= 1_000 for batch in run.batches)
    # 2,500 measurements in batches of at most 1,000, and perhaps a small batch before them.
    assert len(run.batches) <= 4


def test_an_evaluation_leaves_at_once(fake, client, make_spec) -> None:
    run = fake.leased(make_spec(), lease_seconds=900.0)
    with Reporter(client, run.lease, period_seconds=300.0) as reporter:
        reporter.add_measurement(_point(1))
        time.sleep(0.2)
        assert not run.batches
        reporter.add_measurement(_point(2, evaluation=1))
        fake.wait_for(lambda: len(run.curve) == 2, seconds=60)


def test_silence_renews_the_lease_every_third_of_it(fake, client, make_spec) -> None:
    run = fake.leased(make_spec(), lease_seconds=3.0)
    with Reporter(client, run.lease):
        fake.wait_for(lambda: len(run.batches) >= 4)
    assert run.curve == []
    times = [batch.at for batch in run.batches]
    assert all(b - a < 2.5 for a, b in itertools.pairwise(times))


def test_a_decision_reaches_the_run_and_stands(fake, client, make_spec) -> None:
    run = fake.leased(make_spec(), prune_at_evaluation=2)
    with Reporter(client, run.lease) as reporter:
        reporter.add_measurement(_point(1, evaluation=1))
        assert reporter.flush() == "continue"
        reporter.add_measurement(_point(2, evaluation=2))
        assert reporter.flush() == "prune"
        reporter.add_measurement(_point(3))  # the service answers "continue"
        assert reporter.flush() == reporter.check_decision() == "prune"


def test_an_outage_delays_measurements_and_never_the_run(fake, client, make_spec) -> None:
    run = fake.leased(make_spec())
    with Reporter(client, run.lease, period_seconds=0.05) as reporter:
        fake.away = True
        started = time.monotonic()
        for step in range(50):
            reporter.add_measurement(_point(step, evaluation=step + 1))
            assert reporter.check_decision() == "continue"
        assert time.monotonic() - started < 10  # half of the time for which the client retries
        time.sleep(0.5)
        assert run.curve == []
        fake.away = False
        reporter.flush()
    assert [m.step for m in run.curve] == list(range(50))


def test_flush_returns_only_after_everything_is_accepted(fake, client, make_spec) -> None:
    run = fake.leased(make_spec())
    back = threading.Timer(0.5, lambda: setattr(fake, "away", False))
    with Reporter(client, run.lease) as reporter:
        fake.away = True
        reporter.add_measurement(_point(7))
        back.start()
        reporter.flush()
        assert [m.step for m in run.curve] == [7]
    back.join()


def test_a_stale_lease_surfaces_at_the_next_check(fake, client, make_spec) -> None:
    run = fake.leased(make_spec())
    lease = run.lease
    fake.disown(run)
    with Reporter(client, lease) as reporter:
        reporter.add_measurement(_point(1))
        with pytest.raises(StaleLeaseError):
            reporter.flush()
        with pytest.raises(StaleLeaseError):
            reporter.check_decision()
    assert run.curve == []


def test_an_outage_beyond_all_patience_ends_the_run(fake, url, make_spec) -> None:
    run = fake.leased(make_spec())
    fake.away = True
    with (
        Client(url, "key", patience_seconds=0.2) as impatient,
        Reporter(impatient, run.lease) as reporter,
    ):
        reporter.add_measurement(_point(1))
        with pytest.raises(Exception, match="503"):
            reporter.flush()
