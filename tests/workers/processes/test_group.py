"""A run in two processes of a real fleet: a rank is killed, then the fleet drains."""

import os
import signal

import pytest
import torch

from warmcore.corpus.prepare import prepare_corpus
from warmcore.training.events import StepEvent
from warmcore.training.training import Training

pytestmark = pytest.mark.timeout(900)  # seconds, on a busy machine
_LONG = {"num_steps": 1_000_000, "evaluations": 1_000, "log_every": 5}
_FLOAT32 = 1e-5  # relative error: gradients are summed in another order, a few hundred times


@pytest.fixture(scope="module")
def fleet(shared_url, start_fleet):
    fleet = start_fleet(shared_url, "--cpus", "2", "--checkpoint-seconds", "0.5")
    fleet.wait_until_ready()
    return fleet


def test_a_shared_run_outlives_a_rank_drains_and_has_the_curve_of_one_process(
    fleet, shared_fake, make_spec
) -> None:
    run = shared_fake.offer(make_spec(**_LONG), cpus=2, processes=2)
    shared_fake.wait_for(lambda: len(run.checkpoints) > 1, seconds=180)
    _kill_a_rank(fleet)
    shared_fake.wait_for(lambda: run.finish, seconds=180)
    assert (run.finish.outcome, run.finish.retryable) == ("failed", True)
    before = run.checkpoints[-1]

    def goes_on():
        return run.attempt == 2 and run.checkpoints[-1].step > max(before.step + 10, 60)

    shared_fake.wait_for(goes_on, seconds=180)
    assert run.batches[-1].measurements[0].step > before.step
    fleet.signal(signal.SIGTERM)
    assert fleet.process.wait(timeout=120) == 0
    assert (run.finish.outcome, run.state) == ("released", "queued")
    assert run.checkpoints[-1].step >= run.curve[-1].step
    assert (run.finish.provenance.processes, run.finish.provenance.strategy) == (2, "ddp")
    _assert_curve_of_one(run, num_steps=100)


def _kill_a_rank(fleet) -> None:
    ranks = [p for p, title in fleet.descendants().items() if title == "ray::RayTrainWorker"]
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)


def _assert_curve_of_one(run, *, num_steps) -> None:
    torch.set_num_threads(1)
    training = Training.start(run.spec, prepare_corpus(run.spec.data))
    expected = {}
    for event in training.train_to_end():
        if isinstance(event, StepEvent):
            expected[event.step] = event.loss_nats
        if event.step == num_steps:
            break
    measured = {p.step: p.loss_nats for p in run.curve if 0 < p.step <= num_steps}
    assert len(measured) > 10
    assert measured == pytest.approx({step: expected[step] for step in measured}, rel=_FLOAT32)
