"""The fused branches equal the modules' compositions, and need less memory."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from warmcore.model import fused
from warmcore.model.decoder import Decoder, init_weights_, loss_nats
from warmcore.specs import ModelSpec


@st.composite
def specs(draw):
    head_dim, group_size = draw(st.sampled_from([2, 4, 8])), draw(st.sampled_from([1, 2, 3]))
    block = head_dim * group_size
    return ModelSpec(
        width=block * draw(st.integers(1, 3)),
        depth=draw(st.integers(1, 3)),
        head_dim=head_dim,
        group_size=group_size,
        vocab_size=draw(st.integers(2, 40)),
        base_width=block,
        base_depth=draw(st.sampled_from([None, 1, 2])),
        output_multiplier=1.7,
    )


def model_of(spec, dtype=torch.float64):
    """Return a model with random values in every tensor."""
    # Zeros and ones would let a law hold by accident: a gain of 1 cannot reveal a missing gain.
    generator = torch.Generator().manual_seed(0)
    model = init_weights_(Decoder(spec, context=12), spec, generator).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=dtype))
    return model


def window_of(spec, length, batch=3):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(spec.vocab_size, (batch, length), generator=generator)


def loss_and_gradients(model, window):
    model.zero_grad()
    loss = loss_nats(model, window)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


def close(xs, ys):
    return all(torch.allclose(x, y, rtol=1e-9, atol=1e-12) for x, y in zip(xs, ys, strict=True))


@given(specs(), st.integers(2, 12))
def test_loss_and_every_gradient_are_those_of_the_composition(spec, length):
    model, window = model_of(spec), window_of(spec, length)
    made = loss_and_gradients(model, window)
    with fused.disable_fused():
        composed = loss_and_gradients(model, window)
    assert close(made, composed)


@given(specs())
def test_logits_and_an_evaluation_are_those_of_the_composition(spec):
    model, window = model_of(spec), window_of(spec, 9)
    with torch.no_grad():
        made = [model(window), loss_nats(model, window)]
        with fused.disable_fused():
            composed = [model(window), loss_nats(model, window)]
    assert close(made, composed)
    assert not made[1].requires_grad


SPEC = ModelSpec(width=16, depth=2, head_dim=4, group_size=2, vocab_size=23)


@pytest.mark.parametrize("wrong", ["turned", "norm"])
def test_a_wrong_backward_pass_is_seen(monkeypatch, wrong):
    model, window = model_of(SPEC), window_of(SPEC, 12)
    with fused.disable_fused():
        composed = loss_and_gradients(model, window)
    turned, norm = fused._rotate_flat, fused._backpropagate_norm
    if wrong == "turned":
        monkeypatch.setattr(fused, "_rotate_flat", lambda y, table, _sign: turned(y, table, 1))
    else:
        monkeypatch.setattr(fused, "_backpropagate_norm", lambda *a: [g * 1.001 for g in norm(*a)])
    made = loss_and_gradients(model, window)
    # The forward pass is right: only the gradients can reveal the fault.
    assert made[0].item() == pytest.approx(composed[0].item(), rel=1e-12)
    assert not close(made[1:], composed[1:])


@pytest.mark.parametrize("rows", [1, 7, 36])
def test_logits_in_pieces_change_nothing(monkeypatch, rows):
    model, window = model_of(SPEC), window_of(SPEC, 13)
    whole = loss_and_gradients(model, window)
    monkeypatch.setattr(fused, "_LOGITS", rows * SPEC.vocab_size)
    assert close(loss_and_gradients(model, window), whole)


def test_a_scaled_loss_has_scaled_gradients():
    model, window = model_of(SPEC), window_of(SPEC, 12)
    gradients = loss_and_gradients(model, window)[1:]
    model.zero_grad()
    (3 * loss_nats(model, window)).backward()
    assert close([p.grad for p in model.parameters()], [3 * g for g in gradients])


def bytes_kept(model, window):
    """Return the bytes that autograd keeps for the backward pass, parameters excluded."""
    kept = {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss_nats(model, window)
    return sum(kept.values())


def test_less_is_kept_for_the_backward_pass():
    spec = ModelSpec(width=64, depth=4, head_dim=16)
    model = init_weights_(Decoder(spec, context=128), spec, torch.Generator().manual_seed(0))
    window = window_of(spec, 129, batch=8)
    made = bytes_kept(model, window)
    with fused.disable_fused():
        assert made < 0.75 * bytes_kept(model, window)


def test_it_stands_aside_where_pytorch_fuses_or_rounds_by_itself():
    x = torch.zeros(1)
    assert fused.can_fuse(x)
    assert fused.can_fuse(x.double())
    assert not fused.can_fuse(x.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert not fused.can_fuse(x)
    with fused.disable_fused():
        assert not fused.can_fuse(x)
    assert fused.can_fuse(x)
