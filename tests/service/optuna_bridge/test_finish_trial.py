"""The end of a trial: the rows of Optuna's own `tell`, in the transaction that ends the run."""

import contextlib

import optuna
import pytest
from sqlalchemy import event, select, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from service.client import ServiceError
from service.database.tables import Run
from service.leases import attempts
from service.optuna_bridge import finish_trial
from tests.by_hand import end_trial, report_losses

ENDS = {
    "succeeded": optuna.trial.TrialState.COMPLETE,
    "pruned": optuna.trial.TrialState.PRUNED,
    "failed": optuna.trial.TrialState.FAIL,
}


def rows(sampler, study):
    """Return the rows of this study's trials, without ids and exact times."""
    query = text("""
        SELECT t.number, t.state::text, t.datetime_start IS NOT NULL, t.datetime_complete IS NULL,
            abs(extract(epoch FROM t.datetime_complete - (now() AT TIME ZONE 'UTC'))) < 600,
            (SELECT json_agg((objective, value, value_type)::text ORDER BY objective)
             FROM optuna.trial_values WHERE trial_id = t.trial_id),
            (SELECT json_agg((step, intermediate_value, intermediate_value_type)::text
                             ORDER BY step)
             FROM optuna.trial_intermediate_values WHERE trial_id = t.trial_id)
        FROM optuna.trials t JOIN optuna.studies USING (study_id) WHERE study_name = :study""")
    with sampler.engine.connect() as connection:
        return [tuple(row) for row in connection.execute(query, {"study": study})]


@pytest.mark.parametrize("losses", [{}, {1: 3.0}, {1: 3.0, 2: 0.5, 4: -2.25}])
@pytest.mark.parametrize("end", ENDS)
def test_a_trial_that_we_end_has_the_rows_of_one_that_optuna_ends(sampler, end, losses):
    for name in ("ours", "theirs"):
        sampler.create_study(name)
        optuna.load_study(study_name=name, storage=sampler.storage).ask()
        report_losses(sampler, name, 0, losses)
    assert end_trial(sampler, "ours", 0, end, 1.5)
    study = optuna.load_study(study_name="theirs", storage=sampler.storage)
    study.tell(0, 1.5 if end == "succeeded" else None, state=ENDS[end])
    assert rows(sampler, "ours") == rows(sampler, "theirs")
    (ours,), (theirs,) = (
        optuna.load_study(study_name=name, storage=sampler.storage).trials
        for name in ("ours", "theirs")
    )
    assert (ours.state, ours.values) == (theirs.state, theirs.values)


def test_a_diverged_trial_is_the_worst_there_is_whatever_it_reported(sampler):
    for name, losses in (("a", {}), ("b", {1: 3.0, 2: 0.5})):
        sampler.create_study(name)
        study = optuna.load_study(study_name=name, storage=sampler.storage)
        study.ask()
        report_losses(sampler, name, 0, losses)
        end_trial(sampler, name, 0, "diverged")
        (trial,) = study.trials
        assert (trial.state.name, trial.value) == ("PRUNED", float("inf"))
        assert trial.intermediate_values == losses | {max(losses, default=1): float("inf")}


def test_the_first_end_stands(sampler):
    sampler.create_study("s")
    optuna.load_study(study_name="s", storage=sampler.storage).ask()
    report_losses(sampler, "s", 0, {1: 3.0})
    assert end_trial(sampler, "s", 0, "succeeded", 1.5)
    before = rows(sampler, "s")
    # No later end changes a row of a finished trial.
    for end in ("failed", "pruned", "diverged", "succeeded"):
        assert end_trial(sampler, "s", 0, end, 7.0)
    assert rows(sampler, "s") == before


def test_a_trial_that_optuna_has_not_is_not_told(sampler):
    sampler.create_study("s")
    assert not end_trial(sampler, "s", 0, "succeeded", 1.5)


def test_optuna_sees_an_end_though_it_holds_the_trial_as_running(sampler):
    sampler.create_study("s")
    study = optuna.load_study(study_name="s", storage=sampler.storage)
    for _ in range(3):
        study.ask()
    assert [t.state.name for t in study.trials] == ["RUNNING"] * 3  # fills Optuna's cache
    end_trial(sampler, "s", 2, "succeeded", 1.5)
    end_trial(sampler, "s", 0, "failed")
    assert [t.state.name for t in study.trials] == ["FAIL", "RUNNING", "COMPLETE"]


def test_when_a_finish_is_answered_optuna_knows_it(api, submit, worker):
    study = submit()
    assert worker.complete(worker.lease_one(), 1.25) == "succeeded"
    assert api.sampler.read_states(study["name"]) == {0: ("COMPLETE", 1.25)}
    with api.sessions() as session:
        assert session.scalars(select(Run.told)).one()


def test_a_finish_that_fails_is_unheard_of_by_optuna_too(api, submit, worker, monkeypatch):
    study = submit()
    lease = worker.lease_one()

    def away(*_):
        raise OperationalError("", {}, Exception("away"))

    # The study's advance follows the finish of the trial in the same transaction.
    with monkeypatch.context() as patch:
        patch.setattr(attempts, "advance_study", away)  # after the trial was finished in Optuna
        with pytest.raises(ServiceError, match="503"):
            api.client.request(
                "POST",
                f"/v1/runs/{lease.run_id}/finish",
                body={"outcome": "succeeded", "val_loss_nats": 1.0},
                headers={"Lease-Token": lease.lease_token},
                retry=False,
            )
    assert api.sampler.read_states(study["name"]) == {0: ("RUNNING", None)}
    assert worker.finish(lease, loss=1.0) == "succeeded"
    assert api.sampler.read_states(study["name"]) == {0: ("COMPLETE", 1.0)}


@contextlib.contextmanager
def counted(engine):
    """Count the statements and commits of an engine during the block."""
    counts = {"statements": 0, "commits": 0}

    def on_statement(*_):
        counts["statements"] += 1

    def on_commit(*_):
        counts["commits"] += 1

    event.listen(engine, "before_cursor_execute", on_statement)
    event.listen(engine, "commit", on_commit)
    yield counts
    event.remove(engine, "before_cursor_execute", on_statement)
    event.remove(engine, "commit", on_commit)


def test_a_report_is_one_statement_and_a_finish_one_commit(api, submit, worker):
    submit()
    lease = worker.lease_one()
    worker.evaluate(lease, 1, 3.0)
    with counted(api.sessions.kw["bind"]) as counts, counted(api.sampler.engine) as more:
        worker.evaluate(lease, 2, 2.0)
        # A report is a single statement in autocommit mode: it needs no commit.
        assert (counts["statements"], counts["commits"]) == (1, 0)
        worker.finish(lease)
    assert (counts["commits"], more["commits"], more["statements"]) == (1, 0, 0)


def test_ends_have_optuna_s_words():
    ends = [("succeeded", False), ("pruned", False), ("failed", False), ("cancelled", False)]
    assert [finish_trial.trial_end(s, diverged=d) for s, d in ends] == [
        "COMPLETE",
        "PRUNED",
        "FAIL",
        "FAIL",
    ]
    assert finish_trial.trial_end("failed", diverged=True) == "PRUNED"


def test_a_trial_s_number_is_found_by_an_index(sampler):
    with Session(sampler.engine) as session:
        found = session.scalars(text("SELECT indexdef FROM pg_indexes WHERE schemaname = 'optuna'"))
        assert any("(study_id, number)" in definition for definition in found)
