"""`warmscale db check` finds nothing in a service's own database, and every break by hand.

All tests share a database with runs of every kind and state. Each test breaks it in a transaction
that is rolled back, and the check must name that invariant and no other.
"""

import hashlib
import json
from types import SimpleNamespace

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session
from typer.testing import CliRunner

from service.cli.main import app
from service.operations import invariants
from service.operations.invariants.curves import expected_points
from service.protocol import Provenance
from tests.by_hand import Worker
from warmcore.specs import CheckpointRef, RunSpec
from warmcore.specs.run import make_branch

OURS = Provenance(warmscale_version="0", code_hash="0" * 64)
HPO = {"trials": 7, "parallel": 4, "sampler": "random", "pruner": "none"}
# The points of 20 steps with `log_every` 10 and 4 evaluations: each step, and its evaluation.
CURVE = {0: None, 5: 1, 10: 2, 15: 3, 20: 4}


def points(curve):
    return [
        {"step": step, "tokens": step * 256, "val_loss_nats": 3.0, "evaluation": n}
        for step, n in curve.items()
    ]


def train(worker, lease, curve, **end):
    worker.report(lease, *points(curve))
    worker.publish(lease)
    return worker.finish(lease, provenance=OURS, **end)


@pytest.fixture(scope="module")
def happened(shared_api, module_study_spec):
    """Return a study with every kind of end, a live run and an enqueued trial, and its run ids."""
    client = shared_api.client
    worker = Worker(client)
    spec = module_study_spec(
        hpo=HPO,
        search_space={
            "lr": {"type": "float", "low": 1e-3, "high": 3e-2, "log": True},
            "beta1": {"type": "categorical", "choices": [0.8, 0.9]},
        },
    )
    study = client.post("/v1/studies", spec)
    succeeded, pruned, diverged, resumed = worker.lease(4)
    assert train(worker, succeeded, CURVE) == "succeeded"
    worker.report(pruned, *points({0: None, 5: 1}))
    worker.finish(pruned, "pruned", loss=4.0, provenance=OURS)
    worker.evaluate(diverged, 1, 9.0)
    worker.finish(diverged, "diverged", error="loss is nan")
    worker.report(resumed, *points({0: None, 5: 1}))
    worker.publish(resumed, step=5, final=False)
    worker.finish(resumed, "released")
    again = worker.lease_one()
    assert (again.run_id, again.attempt) == (resumed.run_id, 2)
    assert train(worker, again, {10: 2, 15: 3, 20: 4}, loss=2.5) == "succeeded"
    worker.finish(worker.lease_one(), "failed", error="no such device", retryable=False)
    client.post(f"/v1/studies/{study['id']}/pause")
    client.post(f"/v1/studies/{study['id']}/resume")
    live = worker.lease_one()
    worker.report(live, *points({0: None}))
    client.post(f"/v1/studies/{study['id']}/trials", {"params": {"lr": 0.01, "beta1": 0.9}})
    return SimpleNamespace(
        study=study["id"],
        **{name: lease.run_id for name, lease in {
            "succeeded": succeeded, "pruned": pruned, "diverged": diverged, "resumed": resumed,
            "live": live,
        }.items()},
    )  # fmt: skip


@pytest.fixture(scope="module")
def module_study_spec(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(40):
        (folder / f"{i:02d}.txt").write_text(f"document {i} says the same again\n" * 40)

    def make(**changes):
        spec = {
            "name": "happened",
            "data": {"source": str(folder), "context": 32},
            "proxy": {"width": 32, "depth": 1, "head_dim": 16},
            "target": {"width": 64},
            "train": {"batch_size": 8, "num_tokens": 8 * 32 * 20, "evaluations": 4},
        }
        return spec | changes

    return make


@pytest.fixture
def broken(shared_api, happened):
    """Return a function that runs statements and returns the violations as (invariant, run)."""
    with Session(shared_api.engine) as session:
        # Events are append-only; some tests change or delete them.
        session.execute(text("ALTER TABLE warmscale.events DISABLE TRIGGER append_only"))

        def find(*statements, at_rest=False):
            for statement in statements:
                # `:live` in a statement is the id of the live run.
                names = {k: v for k, v in vars(happened).items() if f":{k}" in statement}
                session.execute(text(statement), names)
            report = invariants.check_database(session, at_rest=at_rest)
            return {(one.invariant, one.run_id) for one in report.violations}

        yield find
        session.rollback()


def test_nothing_is_found_where_nothing_was_broken(broken):
    assert broken() == set()


def test_it_sees_one_moment_and_can_change_nothing(shared_api, happened):
    from sqlalchemy.exc import InternalError

    with (
        invariants.open_snapshot(shared_api.engine) as session,
        pytest.raises(InternalError, match="read-only"),
    ):
        session.execute(text("UPDATE warmscale.runs SET step = 1"))


# An event, and a measurement, after the run had ended.
AFTER_THE_END = """
INSERT INTO warmscale.events (study_id, run_id, type, attempt, payload)
VALUES (:study, :succeeded, 'run.queued', 1, '{}')
"""
LATE_POINT = """
INSERT INTO warmscale.measurements (run_id, step, attempt, tokens, evaluation, created_at)
VALUES (:succeeded, 7, 1, 0, NULL, clock_timestamp())
"""


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE warmscale.runs SET state = 'failed' WHERE id = :succeeded",
        "UPDATE warmscale.runs SET error = 'so sorry' WHERE id = :succeeded",
        "UPDATE warmscale.runs SET diverged = true WHERE id = :succeeded",
        "UPDATE warmscale.runs SET attempt = 2 WHERE id = :succeeded",
        AFTER_THE_END,
        LATE_POINT,
    ],
)
def test_a_finished_run_that_changed_is_found(broken, happened, statement):
    assert ("finished-runs-stand", happened.succeeded) in broken(statement)


def test_a_loss_that_changed_is_found_here_and_against_optuna(broken, happened):
    # The loss is in the row, in the event of its end and in Optuna: two of them disagree with it.
    assert broken("UPDATE warmscale.runs SET val_loss_nats = 1.9 WHERE id = :succeeded") == {
        ("finished-runs-stand", happened.succeeded),
        ("optuna-agrees", happened.succeeded),
    }


@pytest.mark.parametrize(
    "statements",
    [
        # seven trials, a budget of three
        ["UPDATE warmscale.studies SET spec = jsonb_set(spec, '{hpo,trials}', '3')"],
        # a number that is not in Optuna
        ["UPDATE warmscale.runs SET trial_number = 100 WHERE id = :live"],
        # a gap in the numbers
        ["UPDATE optuna.trials SET number = 9 WHERE number = 6"],
        # the same number twice
        ["UPDATE optuna.trials SET number = 5 WHERE number = 6"],
        # a finished trial in Optuna without a run
        ["UPDATE optuna.trials SET state = 'COMPLETE' WHERE number = 6"],
        # two runs of one trial
        [
            'ALTER TABLE warmscale.runs DROP CONSTRAINT "uq_runs_study_id_trial_number"',
            "UPDATE warmscale.runs SET trial_number = 0 WHERE id = :live",
        ],
    ],
)  # fmt: skip
def test_a_trial_that_is_not_counted_once_is_found(broken, statements):
    assert "trials-count-once" in {invariant for invariant, _ in broken(*statements)}


STUDY_EVENT = "INSERT INTO warmscale.events (study_id, type, payload) VALUES "
COMPLETED = (
    "UPDATE warmscale.studies SET state = 'completed'",
    STUDY_EVENT + "(:study, 'study.completed', '{}')",
)


def test_a_study_that_completed_without_all_its_trials_is_found(broken, happened):
    assert broken(*COMPLETED) == {
        # Nobody trained the enqueued trial, and the budget is not spent.
        ("trials-count-once", None),
        ("lifecycle-kept", happened.live),
    }


@pytest.mark.parametrize(
    "statements",
    [
        ["UPDATE warmscale.runs SET lease_expires_at = NULL WHERE id = :live"],
        ["UPDATE warmscale.runs SET lease_expires_at = now() WHERE id = :succeeded"],
        [
            (
                "UPDATE warmscale.runs SET lease_token = (SELECT lease_token FROM warmscale.runs "
                "WHERE id = :succeeded) WHERE id = :live"
            )
        ],
        ["UPDATE warmscale.events SET attempt = 1 WHERE type = 'run.leased' AND run_id = :resumed"],
        ["UPDATE warmscale.runs SET failures = 1 WHERE id = :live"],
        ["UPDATE warmscale.runs SET attempt = 2 WHERE id = :live"],
    ],
)
def test_a_lease_beside_another_is_found(broken, statements):
    assert "one-lease" in {invariant for invariant, _ in broken(*statements)}


@pytest.mark.parametrize(
    "statement",
    [
        # by an attempt that did not exist
        "UPDATE warmscale.measurements SET attempt = 7 WHERE run_id = :resumed AND step = 20",
        # before the attempt's lease, and after its end
        "UPDATE warmscale.measurements SET attempt = 2 WHERE run_id = :resumed AND step = 5",
        "UPDATE warmscale.measurements SET attempt = 1 WHERE run_id = :resumed AND step = 15",
        # the same with checkpoints
        (
            "UPDATE warmscale.events SET attempt = 2 WHERE run_id = :resumed "
            "AND type = 'run.checkpoint' AND attempt = 1"
        ),
        (
            "UPDATE warmscale.events SET attempt = 1 WHERE run_id = :resumed "
            "AND type = 'run.checkpoint' AND attempt = 2"
        ),
        "UPDATE warmscale.checkpoints SET attempt = 3 WHERE run_id = :resumed AND attempt = 2",
    ],
)
def test_a_write_outside_its_lease_is_found(broken, happened, statement):
    assert ("no-stale-write", happened.resumed) in broken(statement)


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM warmscale.measurements WHERE run_id = :resumed AND step = 10",
        "DELETE FROM warmscale.measurements WHERE run_id = :resumed AND step = 20",
        "DELETE FROM warmscale.measurements WHERE run_id = :pruned AND step = 0",
        "UPDATE warmscale.measurements SET step = 11 WHERE run_id = :resumed AND step = 10",
        "UPDATE warmscale.measurements SET step = 25 WHERE run_id = :resumed AND step = 20",
        "UPDATE warmscale.measurements SET evaluation = 1 WHERE run_id = :resumed AND step = 10",
        (
            "UPDATE warmscale.events SET payload = '{\"step\": 19}' WHERE type = 'run.checkpoint' "
            "AND run_id = :succeeded"
        ),
    ],
)
def test_a_curve_with_a_fault_is_found(broken, statement):
    assert "curves-whole" in {invariant for invariant, _ in broken(statement)}


def test_a_worker_that_is_not_ours_may_report_what_it_likes(broken):
    without_hash = "UPDATE warmscale.runs SET provenance = provenance - 'code_hash'"
    assert (
        broken(without_hash, "DELETE FROM warmscale.measurements WHERE run_id = :resumed") == set()
    )


def test_what_is_expected_of_a_curve_is_what_a_run_reports(happened, shared_api):
    run = shared_api.client.get(f"/v1/runs/{happened.succeeded}")
    assert expected_points(RunSpec.model_validate(run["spec"]), 20) == CURVE


def test_a_branch_is_expected_to_begin_where_it_left_its_trunk(module_study_spec):
    data = module_study_spec()["data"]
    train = {"tokens_per_param": 1.0, "batch_size": 8, "evaluations": 4, "log_every": 5}
    model = {"width": 32, "depth": 1, "head_dim": 16}
    trunk = RunSpec.model_validate(
        {"model": model, "data": data, "train": train, "seed": 0, "branches": (1.0, 2.0)}
    )
    start = trunk.branch_steps[0]
    whole = make_branch(trunk, 1.0, None)
    total = whole.num_steps
    branch = whole.model_copy(update={"trunk": CheckpointRef(uri="file:///trunk", hash="0" * 64)})
    # The branch's points are those of an unbranched run after the step at which it left its trunk.
    own = {s: n for s, n in expected_points(whole, total).items() if s > start}
    assert expected_points(branch, total) == own
    assert set(own.values()) == {None, 4}


@pytest.mark.parametrize(
    ("statement", "run"),
    [
        ("UPDATE optuna.trials SET state = 'RUNNING' WHERE number = 0", "succeeded"),
        ("UPDATE optuna.trials SET state = 'COMPLETE' WHERE number = 1", "pruned"),
        ("UPDATE optuna.trials SET state = 'FAIL' WHERE number = 2", "diverged"),
        ("UPDATE optuna.trials SET state = 'COMPLETE' WHERE number = 5", "live"),
        ("UPDATE optuna.trial_values SET value = 2.25 WHERE value = 2.5", "resumed"),
        ("UPDATE warmscale.runs SET params = params || '{\"lr\": 0.5}' WHERE id = :live", "live"),
        (
            "UPDATE warmscale.runs SET params = params || '{\"beta1\": 0.5}' WHERE id = :live",
            "live",
        ),
        ("UPDATE warmscale.runs SET params = params - 'beta1' WHERE id = :live", "live"),
    ],
)
def test_a_disagreement_with_optuna_is_found(broken, happened, statement, run):
    assert broken(statement) == {("optuna-agrees", getattr(happened, run))}


# A run that ended, with a trial that Optuna still has as running.
UNTOLD = (
    "UPDATE warmscale.runs SET told = false WHERE id = :succeeded",
    "UPDATE optuna.trials SET state = 'RUNNING' WHERE number = 0",
)


def test_what_optuna_was_not_told_yet_is_pending_and_at_rest_wrong(broken, happened):
    assert broken(*UNTOLD) == set()
    assert broken(at_rest=True) == {("optuna-agrees", happened.succeeded)}


@pytest.mark.parametrize(
    ("statement", "run"),
    [
        ("DELETE FROM warmscale.events WHERE run_id = :pruned AND type = 'run.pruned'", "pruned"),
        ("DELETE FROM warmscale.events WHERE run_id = :live AND type = 'run.queued'", "live"),
        ("UPDATE warmscale.runs SET finished_at = NULL WHERE id = :pruned", "pruned"),
        ("UPDATE warmscale.runs SET finished_at = now() WHERE id = :live", "live"),
        ("UPDATE warmscale.studies SET state = 'paused'", None),
        ("DELETE FROM warmscale.events WHERE type = 'study.created'", None),
    ],
)
def test_a_change_without_its_event_is_found(broken, happened, statement, run):
    assert ("lifecycle-kept", run and getattr(happened, run)) in broken(statement)


CANCELLED = (
    "UPDATE warmscale.studies SET state = 'cancelled'",
    STUDY_EVENT + "(:study, 'study.cancelled', '{}')",
)


def test_a_run_that_lives_on_in_a_study_that_ended_is_found(broken, happened):
    assert broken(*CANCELLED) == {("lifecycle-kept", happened.live)}


# Files


@pytest.fixture
def checkpoint(tmp_path):
    """Write a checkpoint as a worker does, below a path with a space, which a URI must quote."""
    folder = tmp_path / "a place" / "step-00000020"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    facts = {"num_bytes": 7, "sha256": hashlib.sha256(b"weights").hexdigest()}
    manifest = json.dumps({"files": {"model.safetensors": facts}}).encode()
    (folder / "checkpoint.json").write_bytes(manifest)
    return folder, hashlib.sha256(manifest).hexdigest()


def faults(folder, expected_hash):
    from service.operations.invariants import files

    return list(files.find_faults(folder.as_uri(), expected_hash))


def test_files_that_are_whole_have_no_fault(checkpoint):
    assert faults(*checkpoint) == []


def test_each_fault_of_a_file_is_found(checkpoint):
    folder, expected = checkpoint
    weights = folder / "model.safetensors"
    # As many bytes as before: only the hash differs.
    weights.write_bytes(b"weightZ")
    assert "the file has 7 bytes of hash" in faults(folder, expected)[0]
    weights.write_bytes(b"weight")
    assert "the file has 6 bytes of hash" in faults(folder, expected)[0]
    weights.unlink()
    assert faults(folder, expected) == ["model.safetensors: No such file or directory"]
    assert faults(folder, "0" * 64) == [f"checkpoint.json does not have the hash {'0' * 64}"]
    (folder / "checkpoint.json").unlink()
    assert faults(folder, expected) == ["checkpoint.json: No such file or directory"]


def test_a_manifest_that_is_none_is_found(checkpoint):
    folder, _ = checkpoint
    (folder / "checkpoint.json").write_bytes(b"{}")
    expected = hashlib.sha256(b"{}").hexdigest()
    assert faults(folder, expected) == ["checkpoint.json: Field required"]


# The command


@pytest.fixture
def command(shared_api, happened, monkeypatch):
    url = shared_api.engine.url.render_as_string(hide_password=False)
    monkeypatch.setenv("WARMSCALE_DATABASE_URL", url)
    return lambda *options: CliRunner().invoke(app, ["db", "check", *options])


def test_the_command_says_that_all_is_well(command):
    said = command()
    assert (said.exit_code, said.stdout) == (0, "0 violations, 0 pending\n")
    assert json.loads(command("--json").stdout) == {"violations": [], "pending": []}


def test_the_command_names_checkpoints_whose_files_are_not_there_and_fails(command, happened):
    said = command("--files")
    assert said.exit_code == 1
    assert "3 violations, 0 pending" in said.stdout
    assert f"files-whole: {happened.study} {happened.succeeded}: checkpoint" in said.stdout
