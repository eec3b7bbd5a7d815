"""A report is written completely or not at all; the same report twice changes nothing."""

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings
from sqlalchemy import func, select, text

from service.access.caller import Caller
from service.client import StaleLeaseError
from service.database.tables import Measurement as MeasurementRow
from service.database.tables import Run
from service.leases import reports
from service.leases.services import LeaseServices
from service.protocol import Measurement
from service.web.services import find_service

SHOWN = ("step", "tokens", "loss_nats", "val_loss_nats", "tokens_per_second")
EVERYTHING = Caller(key_id="key_1", scopes=frozenset({"work"}), project=None)
ONE = {"trials": 1, "parallel": 1, "sampler": "random", "pruner": "none"}

numbers = st.none() | st.floats(-1e300, 1e300) | st.just(0.1 + 0.2)
points = st.lists(
    st.builds(
        Measurement,
        step=st.integers(0, 12),
        tokens=st.integers(0, 2**53),
        loss_nats=numbers,
        val_loss_nats=numbers,
        evaluation=st.none() | st.integers(1, 5),
        tokens_per_second=st.none() | st.floats(0, 1e12),
    ),
    max_size=6,
).map(tuple)


def shown(run, points):
    """The numbers that a run shows after a report, computed point by point."""
    shows, before = dict(run), run["step"]
    for point in sorted(points, key=lambda p: p.step):
        if point.step >= before:
            given = point.model_dump(include=set(SHOWN), exclude_none=True)
            shows |= given
    return shows


def first_of_each(pairs):
    kept = {}
    for key, value in pairs:
        kept.setdefault(key, value)
    return kept


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(batches=st.lists(points, min_size=1, max_size=4))
def test_a_run_shows_the_newest_of_each_number_and_keeps_the_first_of_each_step(
    api, leased, batches
):
    run_id, token, trial_id = leased()
    run = dict.fromkeys(SHOWN) | {"step": 0, "tokens": 0}
    for batch in batches:
        with find_service(api.app, LeaseServices).statements() as session:
            written = reports.write_report(
                session, EVERYTHING, run_id, token, batch, lease_seconds=60
            )
        assert written is not None
        run = shown(run, batch)
    # The curve and Optuna keep the first report of a step and of an evaluation.
    sent = [point for batch in batches for point in batch]
    losses = first_of_each(
        (p.evaluation, p.val_loss_nats)
        for p in sent
        if p.evaluation is not None and p.val_loss_nats is not None
    )
    with api.sessions() as session:
        row = session.get_one(Run, run_id)
        assert {name: getattr(row, name) for name in SHOWN} == run
        curve = session.scalars(select(MeasurementRow).where(MeasurementRow.run_id == run_id))
        assert {p.step: (p.loss_nats, p.tokens) for p in curve} == first_of_each(
            (p.step, (p.loss_nats, p.tokens)) for p in sent
        )
        values = session.execute(text(_VALUES), {"trial": trial_id})
        assert dict(map(tuple, values)) == losses


_VALUES = (
    "SELECT step, intermediate_value FROM optuna.trial_intermediate_values WHERE trial_id = :trial"
)


@pytest.fixture
def leased(api, submit, worker):
    """The run, the token and Optuna's trial id of a new lease, each in a study of its own."""

    def lease():
        study = submit(hpo=ONE, target=None)
        given = worker.lease_one(study=study["name"])
        storage = api.sampler.storage
        (trial,) = storage.get_all_trials(storage.get_study_id_from_name(study["name"]))
        return given.run_id, given.lease_token, trial._trial_id

    return lease


def test_a_stale_token_writes_nothing_anywhere(api, submit, worker):
    submit(hpo=ONE, target=None)
    lease = worker.lease_one()
    stale = lease.model_copy(update={"lease_token": "of-another-attempt"})
    with api.sessions() as session:
        before = session.get_one(Run, lease.run_id).lease_expires_at
    with pytest.raises(StaleLeaseError):
        worker.evaluate(stale, 1, 3.0)
    with api.sessions() as session:
        assert session.get_one(Run, lease.run_id).lease_expires_at == before
        assert session.scalar(select(func.count()).select_from(MeasurementRow)) == 0
        values = "SELECT count(*) FROM optuna.trial_intermediate_values"
        assert session.scalar(text(values)) == 0


def test_reporting_twice_keeps_the_first_value_in_both_places(api, submit, worker):
    study = submit(hpo=ONE, target=None)
    lease = worker.lease_one()
    assert [worker.evaluate(lease, 1, loss) for loss in (3.0, 9.0)] == ["continue"] * 2
    (trial,) = api.sampler.storage.get_all_trials(
        api.sampler.storage.get_study_id_from_name(study["name"])
    )
    assert trial.intermediate_values == {1: 3.0}
    (point,) = api.client.get(f"/v1/runs/{lease.run_id}/measurements")["items"]
    assert point["val_loss_nats"] == 3.0


def test_a_trial_that_has_ended_in_optuna_hears_no_more(api, submit, worker):
    submit(hpo=ONE, target=None)
    lease = worker.lease_one()
    with api.sessions.begin() as session:
        session.execute(text("UPDATE optuna.trials SET state = 'FAIL'"))
    assert worker.evaluate(lease, 1, 3.0) == "continue"
    with api.sessions.begin() as session:
        values = "SELECT count(*) FROM optuna.trial_intermediate_values"
        assert session.scalar(text(values)) == 0
        # The check after the test wants the trial as it was.
        session.execute(text("UPDATE optuna.trials SET state = 'RUNNING'"))
