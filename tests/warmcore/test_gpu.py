"""The same laws on a CUDA device; without a device each test skips by itself."""

import pytest
import torch

from warmcore.specs import CheckpointRef, GrowthSpec
from warmcore.training.events import StepEvent
from warmcore.training.training import Training

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def losses(training):
    return [event.loss_nats for event in training.train_to_end() if isinstance(event, StepEvent)]


def test_a_cold_start_is_the_same_on_both_devices_and_trains_alike(run_spec, corpus):
    cpu = Training.start(run_spec(steps=20), corpus)
    cuda = Training.start(run_spec(steps=20), corpus, device="cuda")
    for name, tensor in cpu.model.state_dict().items():
        assert torch.equal(tensor, cuda.model.state_dict()[name].cpu())
    assert losses(cuda) == pytest.approx(losses(cpu), rel=1e-3)


def test_a_run_saved_on_one_device_resumes_on_the_other(run_spec, corpus, tmp_path):
    spec = run_spec(steps=20)
    expected = losses(Training.start(spec, corpus))
    first = Training.start(spec, corpus, device="cuda")
    events = first.train_to_end()
    while first.step < 10:
        next(events)
    saved = first.save(tmp_path / "checkpoint")
    for device in ("cpu", "cuda"):
        resumed = Training.resume(spec, corpus, saved.path, device=device)
        assert losses(resumed) == pytest.approx(expected[10:], rel=1e-3)


def test_a_clone_starts_at_its_bases_loss(run_spec, corpus, tmp_path):
    base = Training.start(run_spec(steps=20), corpus, device="cuda")
    list(base.train_to_end())
    saved = base.save(tmp_path / "base")
    growth = GrowthSpec(
        operator="clone",
        optimizer_state="transfer",
        base=CheckpointRef(uri=str(saved.path), hash=saved.hash),
    )
    spec = run_spec(width=32, base_width=16, growth=growth)
    warm = Training.start(spec, corpus, base=saved.path, device="cuda")
    assert next(warm.train_to_end()).val_loss_nats == pytest.approx(saved.val_loss_nats, rel=1e-4)
    assert all(loss < saved.val_loss_nats + 1 for loss in losses(warm))


# torch's inductor itself uses the deprecated torch.jit.
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("fields", [{"compile": True}, {"precision": "bf16"},
                                    {"compile": True, "precision": "bf16", "accumulate": 2,
                                     "activation_checkpointing": True}])  # fmt: skip
def test_options_of_the_step_train_alike(run_spec, corpus, fields):
    size = {"steps": 40, "depth": 2, "batch_size": 8}
    expected = losses(Training.start(run_spec(**size), corpus, device="cuda"))
    found = losses(Training.start(run_spec(**size, **fields), corpus, device="cuda"))
    assert found == pytest.approx(expected, rel=5e-3 if "precision" in fields else 1e-3)
