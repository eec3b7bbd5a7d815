"""The loss and its gradient: precision, accumulation, compilation."""

from functools import partial
from itertools import islice

import pytest
import torch
from pydantic import ValidationError
from torch.autograd.graph import saved_tensors_hooks

from warmcore.model.decoder import Decoder, init_weights_, loss_nats
from warmcore.specs import ModelSpec, TrainSpec
from warmcore.training.events import EvaluationEvent, StepEvent
from warmcore.training.loss import (
    CompilerMissingError,
    accumulate_gradients,
    choose_loss,
    compile_loss,
)
from warmcore.training.training import Training

CONTEXT = 16
SPEC = ModelSpec(width=32, depth=3, head_dim=8, group_size=2, unembedding_std=0.1)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def model_of(dtype=torch.float32, **options):
    return init_weights_(Decoder(SPEC, context=CONTEXT, **options), SPEC, seeded()).to(dtype)


def batch_of(size=8):
    return torch.randint(256, (size, CONTEXT + 1), generator=seeded(1))


def loss_and_gradients(model, *, parts=1, loss_of=loss_nats):
    model.zero_grad()
    loss = accumulate_gradients(loss_of, model, batch_of(), parts=parts)
    return [loss, *(parameter.grad for parameter in model.parameters())]


def losses(training):
    return [event.loss_nats for event in training.train_to_end() if isinstance(event, StepEvent)]


def trained(spec, corpus):
    training = Training.start(spec, corpus)
    return training, list(training.train_to_end())


def assert_all_equal(one, other):
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b)


def test_in_one_part_the_gradient_is_autograds_own():
    model = model_of()
    loss = loss_nats(model, batch_of())
    own = [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]
    assert_all_equal(loss_and_gradients(model), own)


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_accumulated_gradients_are_the_whole_batchs(parts):
    model = model_of(torch.float64)
    whole = loss_and_gradients(model)
    for one, other in zip(loss_and_gradients(model, parts=parts), whole, strict=True):
        assert (one - other).abs().max() <= 1e-12 * other.abs().max()


def test_an_accumulated_run_clips_its_whole_gradient_and_has_the_curve_of_one_part(
    run_spec, corpus
):
    # If each part were clipped, the norm of the sum could not exceed the limit.
    _, expected = trained(run_spec(grad_clip=0.05), corpus)
    _, found = trained(run_spec(grad_clip=0.05, accumulate=4), corpus)
    steps = [(a, b) for a, b in zip(expected, found, strict=True) if isinstance(a, StepEvent)]
    assert all(b.grad_norm == pytest.approx(a.grad_norm, rel=1e-4) for a, b in steps)
    assert all(b.loss_nats == pytest.approx(a.loss_nats, rel=1e-5) for a, b in steps)
    assert all(a.grad_norm > 0.05 for a, _ in steps)


@pytest.mark.parametrize(("size", "works"), [(10, "8 or 12"), (3, "4")])
def test_a_batch_that_has_no_equal_parts_is_refused_with_sizes_that_have(size, works):
    message = f"batch_size {size} is no multiple of accumulate 4; batch_size {works} would work"
    with pytest.raises(ValidationError, match=message):
        TrainSpec(batch_size=size, accumulate=4)


def saved_bytes(model):
    num_bytes = 0

    def count(tensor):
        nonlocal num_bytes
        num_bytes += tensor.nbytes
        return tensor

    with saved_tensors_hooks(count, lambda tensor: tensor):
        loss_nats(model, batch_of())
    return num_bytes


def test_recomputed_blocks_have_the_same_loss_and_gradients_and_hold_less():
    plain, recomputing = model_of(), model_of(activation_checkpointing=True)
    assert_all_equal(loss_and_gradients(recomputing), loss_and_gradients(plain))
    assert saved_bytes(recomputing) < saved_bytes(plain) / 2


def test_a_run_with_recomputed_blocks_is_the_same_run(run_spec, corpus):
    expected = losses(Training.start(run_spec(depth=2), corpus))
    spec = run_spec(depth=2, activation_checkpointing=True)
    assert losses(Training.start(spec, corpus)) == expected


def test_bf16_multiplies_in_bfloat16_and_keeps_the_stream_and_the_loss_in_float32():
    model, kinds = model_of(), {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda _m, _i, y, name=name: kinds.update({name: y.dtype}))
    loss = choose_loss("bf16")(model, batch_of())
    low = {name for name, kind in kinds.items() if kind == torch.bfloat16}
    products = {"q", "k", "v", "o", "attention", "gate", "up", "down", "ffn", "unembedding"}
    assert {name.rsplit(".")[-1] for name in low} == products
    assert {kinds[name] for name in ("blocks.2", "blocks.2.ffn_norm", "final_norm")} == {
        torch.float32
    }
    assert loss.dtype == torch.float32
    assert loss != loss_nats(model, batch_of())


def test_bf16_trains_to_about_float32s_loss_with_weights_and_optimizer_in_float32(run_spec, corpus):
    fields = {"steps": 60, "batch_size": 8, "width": 32, "depth": 2}
    _, expected = trained(run_spec(**fields), corpus)
    training, found = trained(run_spec(**fields, precision="bf16"), corpus)
    assert found[-1].val_loss_nats == pytest.approx(expected[-1].val_loss_nats, abs=0.03)
    assert found[-1].val_loss_nats < found[0].val_loss_nats - 1
    state = [v for values in training.optimizer.state.values() for v in values.values()]
    gradients = [parameter.grad for parameter in training.model.parameters()]
    kept = [*training.model.parameters(), *gradients, *state]
    assert {tensor.dtype for tensor in kept} == {torch.float32}


def test_bf16_and_parts_and_recomputing_go_together(run_spec, corpus):
    fields = {"precision": "bf16", "accumulate": 2}
    expected = losses(Training.start(run_spec(**fields), corpus))
    spec = run_spec(**fields, activation_checkpointing=True)
    assert losses(Training.start(spec, corpus)) == expected


def test_a_compiled_run_is_the_run_compiles_once_and_resumes_under_the_same_names(
    run_spec, corpus, tmp_path, monkeypatch
):
    # Traced and split into forward and backward, as always; the C++ takes half a minute to build
    # and has its test on a GPU, and its run in the log.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 1)
    # Validation has a batch of 10 windows, training 2 parts of 2 windows: two shapes.
    fields = {"steps": 6, "batch_size": 4, "accumulate": 2, "eval_tokens": 160}
    plain, expected = trained(run_spec(**fields), corpus)
    compiled = Training.start(run_spec(**fields, compile=True), corpus)
    first = list(islice(compiled.train_to_end(), 5))
    saved = compiled.save(tmp_path / "checkpoint")
    resumed = Training.resume(compiled.spec, corpus, saved.path)
    found = first + list(resumed.train_to_end())
    assert set(resumed.model.state_dict()) == set(plain.model.state_dict())
    for one, other in zip(found, expected, strict=True):
        assert type(one) is type(other)
        name = "val_loss_nats" if isinstance(one, EvaluationEvent) else "loss_nats"
        assert getattr(one, name) == pytest.approx(getattr(other, name), rel=1e-5)


def test_compiling_without_a_compiler_is_refused_before_the_first_step(
    run_spec, corpus, monkeypatch
):
    monkeypatch.setenv("CXX", "no-such-compiler -O3")
    with pytest.raises(CompilerMissingError, match=r"C\+\+ compiler no-such-compiler .* CXX"):
        Training.start(run_spec(compile=True), corpus)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(CompilerMissingError, match=r"C compiler gcc or clang .* CC"):
        compile_loss(loss_nats, torch.device("cuda"))
