"""The optimizer's groups and state, and clipping that weighs vector-like tensors."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from warmcore.model.decoder import Decoder, init_weights_
from warmcore.model.mup import factors, role_of
from warmcore.specs import ModelSpec, TrainSpec
from warmcore.training.optimizer import (
    build_optimizer,
    clip_gradients_,
    load_optimizer_tensors,
    optimizer_tensors,
    set_lr,
    vector_norm_weight,
)

SPEC = ModelSpec(width=32, depth=2, head_dim=8, base_width=8, vocab_size=20)
TRAIN = TrainSpec(lr=0.01, weight_decay=0.3, eps=1e-6)


def with_gradients(seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    model = init_weights_(Decoder(SPEC, context=4), SPEC, generator).double()
    for parameter in model.parameters():
        parameter.grad = scale * torch.randn(parameter.shape, generator=generator).double()
    return model, build_optimizer(model.named_parameters(), SPEC, TRAIN)


def squares(model, *, hidden):
    return sum(
        (p.grad**2).sum().item()
        for name, p in model.named_parameters()
        if (role_of(name) == "hidden") == hidden
    )


@given(st.integers(0, 99), st.floats(0.01, 100), st.floats(0.25, 16))
def test_the_clipping_norm_weights_vector_like_tensors(seed, scale, weight):
    model, optimizer = with_gradients(seed, scale)
    expected = math.sqrt(squares(model, hidden=True) + weight * squares(model, hidden=False))
    assert clip_gradients_(optimizer, weight, None).item() == pytest.approx(expected, rel=1e-12)


def test_the_weight_is_the_width_multiplier_and_one_for_plain_clipping():
    assert vector_norm_weight("width_weighted", SPEC) == SPEC.width_multiplier == 4
    assert vector_norm_weight("plain", SPEC) == 1


@given(st.floats(0.01, 100))
def test_plain_clipping_is_torchs(scale):
    (model, optimizer), (twin, _) = with_gradients(scale=scale), with_gradients(scale=scale)
    norm = clip_gradients_(optimizer, 1.0, 1.0)
    torch_norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
    assert norm.item() == pytest.approx(torch_norm.item(), rel=1e-12)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-12)


def test_gradients_within_the_bound_are_left_alone():
    model, optimizer = with_gradients()
    before = [p.grad.clone() for p in model.parameters()]
    clip_gradients_(optimizer, 4.0, 1e9)
    assert all(torch.equal(a, p.grad) for a, p in zip(before, model.parameters(), strict=True))


def test_each_parameter_is_in_one_group_with_its_roles_factors():
    model, optimizer = with_gradients()
    set_lr(optimizer, 0.5)
    names = []
    for group in optimizer.param_groups:
        row = factors(group["role"], SPEC)
        assert group["lr"] == 0.01 * row.lr * 0.5
        assert group["weight_decay"] == 0.3 * row.weight_decay
        assert group["eps"] == 1e-6 * row.eps
        assert {role_of(name) for name in group["names"]} == {group["role"]}
        names += group["names"]
    assert sorted(names) == sorted(dict(model.named_parameters()))


def test_optimizer_state_survives_a_round_trip_by_name():
    model, optimizer = with_gradients()
    optimizer.step()
    saved = {name: tensor.clone() for name, tensor in optimizer_tensors(optimizer).items()}
    twin, other = with_gradients()
    load_optimizer_tensors(other, saved)
    twin.load_state_dict(model.state_dict())
    for pair in ((model, optimizer), (twin, other)):
        pair[1].step()
    assert len(saved) == 3 * len(list(model.parameters()))
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)
