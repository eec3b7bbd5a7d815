"""A run on the real API, from the lease to the end."""

import threading

import pytest

from service.client import StaleLeaseError
from tests.workers.spy import Spy
from warmcore.checkpoint.checkpoint import CheckpointCorruptError
from warmcore.corpus import prepare as data
from warmcore.specs import CheckpointRef
from warmcore.specs.run import make_branch
from warmcore.storage.locations import local_path
from warmcore.training.events import EvaluationEvent
from warmcore.training.training import Training
from workers.attempt import checkpoints
from workers.attempt.execute import _Attempt, execute_lease
from workers.attempt.options import AttemptOptions
from workers.attempt.reporter import CancelledError, Reporter
from workers.failures import UnrunnableError, describe_failure

EVALUATED_OFTEN = {"num_steps": 3_000, "evaluations": 300}


class _DrainAfter:
    """A drain flag that is raised after `reads` reads."""

    def __init__(self, reads: int) -> None:
        self.reads = reads

    def __call__(self) -> bool:
        self.reads -= 1
        return self.reads < 0


@pytest.fixture
def lease(submit, worker, text):
    """Lease the first run of a new study of small models; keywords set fields of the train spec."""

    def lease(*, num_steps=20, study=None, **train):
        options = {"batch_size": 4, "log_every": 5, "evaluations": 4, "eval_tokens": 512}
        spec = {
            "data": {"source": str(text), "context": 32},
            "proxy": {"width": 16, "depth": 1, "head_dim": 16},
            "target": {"width": 32},
            "train": options | {"num_tokens": num_steps * 128} | train,
            "hpo": {"trials": 1, "sampler": "random", "pruner": "none"},
        }
        created = submit(**spec | (study or {}))
        return worker.lease_one(study=created["id"])

    return lease


@pytest.fixture
def spy(api):
    """Make clients of the API that record every accepted message."""
    spies = []

    def spy():
        spies.append(Spy(api.url, api.key))
        return spies[-1]

    yield spy
    for client in spies:
        client.close()


@pytest.fixture
def run(spy):
    """Run a lease; return its ending and the client with the accepted messages."""

    def run(lease, *, checkpoint_seconds=1e9, **kwargs):
        client = spy()
        options = AttemptOptions(checkpoint_seconds=checkpoint_seconds)
        return execute_lease(lease, client, options=options, **kwargs), client

    return run


def test_a_run_reports_its_whole_curve_one_measurement_per_step(lease, run):
    ending, sent = run(lease(num_steps=20))
    assert ending == "succeeded"
    assert [m.step for m in sent.curve] == [0, 5, 10, 15, 20]
    assert [m.evaluation for m in sent.curve] == [None, 1, 2, 3, 4]
    assert all(m.val_loss_nats for m in sent.curve)
    assert sent.curve[-1].val_loss_nats < sent.curve[0].val_loss_nats


def test_a_finished_run_says_what_it_was_made_with(api, lease, run):
    leased = lease()
    _, sent = run(leased)
    stored = api.client.get(f"/v1/runs/{leased.run_id}")
    made_with, timing = stored["provenance"], stored["timing"]
    assert (stored["state"], stored["step"]) == ("succeeded", 20)
    assert stored["val_loss_nats"] == sent.curve[-1].val_loss_nats
    assert len(made_with["code_hash"]) == len(made_with["data_hash"]) == 64
    assert {"torch", "python", "numpy"} <= made_with["packages"].keys()
    assert made_with["num_threads"] == 1
    assert timing["train_seconds"] > 0
    assert timing["first_step_at"] < timing["last_step_at"]
    seconds = sum(m.train_seconds or 0 for m in sent.curve)
    assert seconds == pytest.approx(timing["train_seconds"])


def test_the_final_checkpoint_stands_before_the_run_is_finished(lease, run):
    leased = lease(num_steps=7)
    _, sent = run(leased)
    (final,) = sent.checkpoints
    assert final.final
    assert (final.step, final.tokens) == (7, 7 * 128)
    assert final.uri == f"{leased.artifact_uri}/step-00000007"
    assert local_path(final.uri).is_dir()


def test_every_measurement_up_to_a_checkpoint_is_accepted_before_it(lease, run):
    _, sent = run(lease(num_steps=20, log_every=2), checkpoint_seconds=0.0)
    assert len(sent.checkpoints) > 10
    # Every second step is logged; evaluations are at 5, 10, 15 and 20.
    measured = {0, *range(2, 21, 2), 5, 15}
    for checkpoint, steps in zip(sent.checkpoints, sent.steps_at_checkpoint, strict=True):
        assert steps == {step for step in measured if step <= checkpoint.step}
    assert [m.step for m in sent.curve] == sorted(measured)


def test_a_resumed_run_ends_with_the_same_curve_bit_for_bit(lease, run, worker):
    leased = lease(log_every=1)
    # The same run twice: uninterrupted, and drained after 8 steps and resumed.
    _, whole = run(leased)
    again = lease(log_every=1)
    assert again.spec == leased.spec
    ending, first = run(again, draining=_DrainAfter(8))
    assert ending == "released"
    ending, resumed = run(worker.lease_one(study=again.study_id))
    assert ending == "succeeded"
    assert first.losses | resumed.losses == whole.losses
    assert not first.losses.keys() & resumed.losses.keys()
    assert resumed.finished.val_loss_nats == whole.finished.val_loss_nats


@pytest.mark.parametrize("damage", ["corrupt", "missing"])
def test_a_run_falls_back_to_the_next_older_checkpoint(lease, run, worker, damage):
    run(lease(log_every=1), checkpoint_seconds=0.0, draining=_DrainAfter(8))
    second = worker.lease_one()
    newest, older = second.resume_from
    if damage == "corrupt":
        weights = local_path(newest.uri) / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    else:
        local_path(newest.uri).rename(local_path(newest.uri).with_name("elsewhere"))
    ending, sent = run(second)
    assert ending == "succeeded"
    assert f"step-{min(sent.losses) - 1:08d}" == local_path(older.uri).name


def test_without_a_usable_checkpoint_a_run_starts_again(lease, run, worker):
    run(lease(), draining=_DrainAfter(8))
    second = worker.lease_one()
    (only,) = second.resume_from
    local_path(only.uri).rename(local_path(only.uri).with_name("elsewhere"))
    ending, sent = run(second)
    assert ending == "succeeded"
    assert sent.curve[0].step == 0


def test_a_run_whose_finish_was_lost_finishes_from_its_final_checkpoint(lease, run, spy, worker):
    leased = lease(num_steps=10)
    client = spy()
    # Stands for a process that is killed after its final checkpoint and before its finish.
    client.finish = lambda *_: worker.finish(leased, "failed")
    execute_lease(leased, client, options=AttemptOptions())
    ending, again = run(worker.lease_one(wait_seconds=5))
    assert ending == "succeeded"
    assert again.curve == []
    assert again.finished.val_loss_nats == client.curve[-1].val_loss_nats


def test_a_target_grows_from_its_base_and_says_which(api, lease, run, worker):
    _, base = run(lease(study={"warmstart": {"seeds": 1, "control": False}}))
    target = worker.lease_one()
    assert (target.kind, target.arm) == ("target", "warm")
    ending, sent = run(target)
    assert ending == "succeeded"
    assert sent.finished.provenance.base_hash == base.checkpoints[-1].hash


def test_a_target_whose_base_is_damaged_says_so_and_grows_from_nothing_else(
    api, lease, run, worker
):
    run(lease(study={"warmstart": {"seeds": 1}}))
    warm, cold = sorted(worker.lease(2), key=lambda lease: lease.arm, reverse=True)
    assert (warm.arm, cold.arm) == ("warm", "cold")
    weights = local_path(warm.spec.growth.base.uri) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with pytest.raises(CheckpointCorruptError) as raised:
        run(warm)
    finish = describe_failure(raised.value, draining=False)
    assert "growth.base: " in finish.error
    assert "model.safetensors is corrupt" in finish.error
    assert "by hand from another trial" in finish.error
    assert finish.retryable
    assert api.client.get(f"/v1/runs/{warm.run_id}")["step"] == 0
    assert run(cold)[0] == "succeeded"


def test_a_pruned_run_stops_at_the_evaluation_and_keeps_its_curve(lease, run, worker):
    hpo = {"trials": 2, "parallel": 2, "sampler": "random", "pruner": "successive_halving"}
    better = lease(study={"hpo": hpo}, **EVALUATED_OFTEN)
    worker.evaluate(better, evaluation=1, loss=0.0)
    ending, sent = run(worker.lease_one())
    assert ending == sent.finished.outcome == "pruned"
    assert sent.finished.val_loss_nats in {m.val_loss_nats for m in sent.curve}
    assert sent.curve[-1].step < 3_000
    assert sent.checkpoints == []


def test_a_cancelled_run_stops_quietly(api, lease, run):
    leased = lease(**EVALUATED_OFTEN)
    api.client.post(f"/v1/studies/{leased.study_id}/cancel")
    ending, sent = run(leased)
    assert ending == "cancelled"
    assert sent.finished is None


def test_a_run_whose_lease_is_stale_writes_nothing_more(lease, run, worker):
    leased = lease(**EVALUATED_OFTEN)
    worker.finish(leased, "released")
    other = worker.lease_one()
    ending, sent = run(leased)
    assert ending == "stale"
    assert sent.curve == sent.checkpoints == []
    assert sent.finished is None
    assert worker.finish(other, "released") == "queued"
    with pytest.raises(StaleLeaseError):
        worker.report(leased)


def test_a_diverged_run_says_why(api, lease, run):
    space = {"search_space": {"lr": {"type": "categorical", "choices": [1e6]}}}
    leased = lease(num_steps=300, grad_clip=None, study=space)
    ending, sent = run(leased)
    assert ending == sent.finished.outcome == "diverged"
    assert "nan" in sent.finished.error or "loss" in sent.finished.error
    assert api.client.get(f"/v1/runs/{leased.run_id}")["state"] == "failed"


def test_superseded_checkpoints_are_deleted(api, lease, run):
    leased = lease()
    _, sent = run(leased, checkpoint_seconds=0.0)
    kept = api.client.get(f"/v1/runs/{leased.run_id}/checkpoints")["items"]
    folders = sorted(local_path(leased.artifact_uri).iterdir())
    assert folders == sorted(local_path(checkpoint["uri"]) for checkpoint in kept)
    assert len(folders) == 2 < len(sent.checkpoints)


def test_a_run_survives_an_outage(fake, client, make_spec):
    leased = fake.leased(make_spec(num_steps=40))
    fake.away = True
    back = threading.Timer(1.0, lambda: setattr(fake, "away", False))
    back.start()
    assert execute_lease(leased.lease, client, options=AttemptOptions()) == "succeeded"
    back.join()
    assert [m.step for m in leased.curve] == list(range(0, 41, 5))


def test_a_spec_that_cannot_run_is_a_value_error(lease, run, tmp_path):
    leased = lease()
    data = leased.spec.data.model_copy(update={"source": str(tmp_path / "nothing")})
    spec = leased.spec.model_copy(update={"data": data})
    with pytest.raises(UnrunnableError, match="nothing"):
        run(leased.model_copy(update={"spec": spec}))


def test_a_trunk_is_checkpointed_where_its_branches_leave_and_they_are_whole_runs(
    api, lease, run, worker, text
):
    target = {"width": 32, "budgets": [0.1, 0.2]}
    trial = lease(study={"target": target, "warmstart": {"seeds": 1, "control": False}})
    run(trial)
    trunk = worker.lease_one(study=trial.study_id)
    ending, sent = run(trunk)
    assert ending == "succeeded"
    assert tuple(c.step for c in sent.checkpoints) == trunk.spec.branch_steps
    assert [c.final for c in sent.checkpoints] == [False, True]
    for budget, start in zip(trunk.spec.branches, trunk.spec.branch_steps, strict=True):
        branch = worker.lease_one(study=trial.study_id)
        _, first = run(branch, draining=_DrainAfter(2))
        _, resumed = run(worker.lease_one(study=trial.study_id))
        whole = Training.start(
            make_branch(trunk.spec, budget, None),
            data.prepare_corpus(trunk.spec.data),
            base=local_path(trunk.spec.growth.base.uri),
        )
        expected = [e.val_loss_nats for e in whole.train_to_end() if isinstance(e, EvaluationEvent)]
        measured = [m.val_loss_nats for m in (*first.curve, *resumed.curve) if m.val_loss_nats]
        assert measured == expected[-len(measured) :]
        assert min(m.step for m in first.curve) > start
        stored = api.client.get(f"/v1/runs/{branch.run_id}")
        assert (stored["state"], stored["step"]) == ("succeeded", whole.spec.num_steps)
        assert stored["trunk_id"] == trunk.run_id


def test_an_attempt_keeps_what_it_is_given_and_prepares_nothing(fake, client, make_spec):
    spec = make_spec()
    training = Training.start(spec, data.prepare_corpus(spec.data))
    missing = spec.data.model_copy(update={"source": "/nothing/is/here"})
    leased = fake.leased(spec.model_copy(update={"data": missing})).lease
    given = CheckpointRef(uri="file:///nothing/is/here", hash="0" * 64)
    leased = leased.model_copy(update={"resume_from": (given,)})
    reporter, options = Reporter(client, leased), AttemptOptions()
    attempt = _Attempt(leased, client, reporter, options, corpus=None, training=training)
    assert attempt.step == 0
    with pytest.raises(UnrunnableError, match="/nothing/is/here"):
        _Attempt.prepared(leased, client, reporter, options)


def test_an_attempt_that_is_cancelled_while_it_waits_to_resume_ends(
    fake, client, make_spec, monkeypatch
):
    leased = fake.leased(make_spec()).lease
    given = CheckpointRef(uri="s3://bucket/away", hash="0" * 64)
    leased = leased.model_copy(update={"resume_from": (given,)})

    def fail(_):
        raise ConnectionResetError

    monkeypatch.setattr(checkpoints, "open_local", fail)
    reporter = Reporter(client, leased)
    monkeypatch.setattr(reporter, "check_decision", lambda: "cancel")
    with pytest.raises(CancelledError):
        _Attempt.prepared(leased, client, reporter, AttemptOptions())


# A store that is full or away. A file at the path of the run's folder makes every write below fail.


@pytest.fixture
def refused(lease):
    """Lease a run with a store that refuses its checkpoints until the returned file is unlinked."""

    def refused(**changes):
        leased = lease(**changes)
        obstacle = local_path(leased.artifact_uri).parent
        obstacle.parent.mkdir(parents=True)
        obstacle.touch()
        return leased, obstacle

    return refused


@pytest.mark.parametrize("reads", [5, 22])  # in the middle; and while the trained run waits
def test_a_store_that_is_away_costs_a_run_time_and_nothing_else(api, refused, run, reads):
    leased, obstacle = refused()
    is_time = _DrainAfter(reads)

    def draining():
        if is_time():
            obstacle.unlink(missing_ok=True)
            is_time.reads = 1000
        return False

    ending, _ = run(leased, checkpoint_seconds=0, draining=draining)
    assert ending == "succeeded"
    after = api.client.get(f"/v1/runs/{leased.run_id}")
    assert (after["state"], after["attempt"], after["failures"]) == ("succeeded", 1, 0)
    (kept, *_) = api.client.get(f"/v1/runs/{leased.run_id}/checkpoints")["items"]
    assert (kept["step"], kept["final"]) == (20, True)


def test_a_store_that_stays_away_ends_the_attempt_with_the_reason(refused, spy):
    leased, _ = refused()
    with pytest.raises(NotADirectoryError):
        execute_lease(leased, spy(), options=AttemptOptions(store_patience_seconds=0))


def test_a_run_that_is_cancelled_while_it_waits_for_the_store_ends(api, refused, run):
    leased, _ = refused()
    cancel = threading.Timer(1.0, lambda: api.client.post(f"/v1/studies/{leased.study_id}/cancel"))
    cancel.start()
    assert run(leased)[0] == "cancelled"
    cancel.join()


def test_a_fleet_that_drains_gives_back_what_waits_for_the_store(api, refused, run):
    leased, _ = refused()
    started = threading.Event()
    drain = threading.Timer(1.0, started.set)
    drain.start()
    assert run(leased, draining=started.is_set)[0] == "released"
    drain.join()
    after = api.client.get(f"/v1/runs/{leased.run_id}")
    assert (after["state"], after["failures"]) == ("queued", 0)
