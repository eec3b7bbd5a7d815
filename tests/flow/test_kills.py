"""kill -9 of a training process, of the API and of the fleet, each in the middle of a study.

After a restart the study completes, every trial counts once, and every curve is complete: point for
point it equals the curve of an uninterrupted run.
"""

import os
import signal

import pytest

from warmcore.corpus import prepare
from warmcore.specs import RunSpec
from warmcore.training.events import EvaluationEvent, StepEvent
from warmcore.training.training import Training

pytestmark = pytest.mark.timeout(900)  # seconds, on a busy machine


def find_leased_with_checkpoint(client, study):
    """Return a leased trial that has a checkpoint and is far from its end."""
    for run in client.get("/v1/runs", study=study, state="leased", kind="trial")["items"]:
        if client.get(f"/v1/runs/{run['id']}/checkpoints")["items"]:
            return run
    return None


def find_ended(client, study):
    view = client.get(f"/v1/studies/{study}")
    return view if view["state"] in ("completed", "failed", "cancelled") else None


def train_uninterrupted(spec):
    """Train the same run in this process; return its losses and validation losses by step."""
    import torch

    torch.set_num_threads(1)
    losses, evaluations = {}, {}
    for event in Training.start(spec, prepare.prepare_corpus(spec.data)).train_to_end():
        if isinstance(event, StepEvent):
            losses[event.step] = event.loss_nats
        elif isinstance(event, EvaluationEvent):
            evaluations[event.step] = event.val_loss_nats
    return losses, evaluations


def check_curve(client, run):
    points = client.get(f"/v1/runs/{run['id']}/measurements")["items"]
    steps = [p["step"] for p in points]
    train = run["spec"]["train"]
    # Step 0 has only the evaluation before training, and no loss to log.
    logged = set(range(0, run["num_steps"] + 1, train["log_every"])) - {0}
    assert steps == sorted(set(steps))
    assert logged <= set(steps), sorted(logged - set(steps))[:5]
    assert {p["evaluation"] for p in points} - {None} == set(range(1, train["evaluations"] + 1))
    assert steps[-1] == run["num_steps"]
    return points


def check_study(client, study, processes):
    view = client.get(f"/v1/studies/{study}")
    assert view["state"] == "completed", view["reason"]
    assert (view["trials"]["succeeded"], view["targets"]["succeeded"]) == (4, 4)
    trials = client.get(f"/v1/studies/{study}/trials")["items"]
    assert [t["number"] for t in trials] == [0, 1, 2, 3]
    assert [t["state"] for t in trials] == ["succeeded"] * 4
    for run in client.get("/v1/runs", study=study)["items"]:
        assert run["state"] == "succeeded"
        check_curve(client, run)
    check_optuna(processes, study, trials)


def check_optuna(processes, study, trials):
    from service.database.engine import optuna_url
    from service.optuna_bridge.sampler import Sampler

    sampler = Sampler(optuna_url(processes.database_url), pool_size=1)
    in_optuna = sampler.read_states(study)
    sampler.close()
    assert in_optuna == {t["number"]: ("COMPLETE", t["val_loss_nats"]) for t in trials}


def check_same_as_uninterrupted(client, run_id):
    run = client.get(f"/v1/runs/{run_id}")
    losses, evaluations = train_uninterrupted(RunSpec.model_validate(run["spec"]))
    for point in client.get(f"/v1/runs/{run_id}/measurements")["items"]:
        if point["loss_nats"] is not None:
            assert point["loss_nats"] == losses[point["step"]]
        if point["val_loss_nats"] is not None:
            assert point["val_loss_nats"] == evaluations[point["step"]]


@pytest.fixture
def running(client, small_study, flow):
    """The name of a study, and a running trial of it that has a checkpoint."""
    study = client.post("/v1/studies", small_study())["name"]
    run = flow.wait_for(lambda: find_leased_with_checkpoint(client, study))
    return study, run


def test_a_killed_training_process_costs_an_attempt_and_nothing_else(
    client, processes, running, flow
):
    study, run = running
    victims = flow.training_processes(processes.fleet)
    assert victims
    for victim in victims:
        os.kill(victim.pid, signal.SIGKILL)
    flow.wait_for(lambda: find_ended(client, study))
    check_study(client, study, processes)
    after = client.get(f"/v1/runs/{run['id']}")
    assert after["attempt"] > run["attempt"]
    assert after["failures"] >= 1
    check_same_as_uninterrupted(client, run["id"])


def test_a_killed_api_loses_nothing_and_stops_no_training(client, processes, running, flow):
    study, run = running
    flow.kill(processes.api)
    processes.start_api()
    flow.wait_for(lambda: find_ended(client, study))
    check_study(client, study, processes)
    after = client.get(f"/v1/runs/{run['id']}")
    # The worker retried its reports until the new API answered.
    assert (after["attempt"], after["failures"]) == (run["attempt"], 0)
    check_same_as_uninterrupted(client, run["id"])


def test_a_killed_fleet_leaves_no_process_and_the_next_one_resumes(
    client, processes, running, flow
):
    import psutil

    study, run = running
    training = flow.training_processes(processes.fleet)
    assert training
    flow.kill(processes.fleet)
    psutil.wait_procs(training, timeout=60)
    assert [p for p in training if p.is_running() and p.status() != psutil.STATUS_ZOMBIE] == []
    processes.start_fleet()
    flow.wait_for(lambda: find_ended(client, study))
    check_study(client, study, processes)
    after = client.get(f"/v1/runs/{run['id']}")
    assert after["attempt"] > run["attempt"]
    assert "expired" in str(read_events(client, processes, run["id"]))
    check_same_as_uninterrupted(client, run["id"])


def read_events(client, processes, run_id):
    return client.request("GET", f"/v1/runs/{run_id}/events").text
