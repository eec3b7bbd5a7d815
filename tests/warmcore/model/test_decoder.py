"""The decoder's function, causality and initial values."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F  # noqa: N812

from warmcore.model.decoder import Decoder, init_weights_, loss_nats, parameter_shapes
from warmcore.model.mup import GAINS, role_of
from warmcore.specs import ModelSpec
from warmcore.specs.sizes import count_params
from warmcore.training.optimizer import ROLES


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def model_of(spec, *, context=12, seed=0):
    """Return a model with random values in every tensor."""
    # Zeros and ones would let a law hold by accident: a gain of 1 cannot reveal a missing gain.
    model = init_weights_(Decoder(spec, context=context), spec, seeded(seed)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=seeded(seed + 1)))
    return model


def tokens_of(spec, *, batch=2, length=12, seed=0):
    return torch.randint(spec.vocab_size, (batch, length), generator=seeded(seed))


@st.composite
def specs(draw):
    head_dim = draw(st.sampled_from([2, 4, 8]))
    group_size = draw(st.sampled_from([1, 2, 3]))
    return ModelSpec(
        width=head_dim * group_size * draw(st.integers(1, 3)),
        depth=draw(st.integers(1, 3)),
        head_dim=head_dim,
        group_size=group_size,
        vocab_size=draw(st.integers(2, 50)),
    )


@given(specs())
def test_the_model_has_the_parameters_that_the_arithmetic_counts(spec):
    counts = dict.fromkeys(ROLES, 0)
    for name, shape in parameter_shapes(spec).items():
        counts[role_of(name)] += shape.numel()
    counts["gain"] += counts.pop("final_gain")
    expected = count_params(spec)
    assert counts == {
        "embedding": expected.embedding,
        "hidden": expected.hidden,
        "gain": expected.gains,
        "unembedding": expected.unembedding,
    }


@given(specs(), st.integers(1, 11))
def test_no_token_sees_a_later_one(spec, position):
    model, tokens = model_of(spec), tokens_of(spec)
    changed = tokens.clone()
    changed[:, position:] = (changed[:, position:] + 1) % spec.vocab_size
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :position], after[:, :position])
    assert not torch.equal(before[:, position], after[:, position])


def reference_logits(weights, spec, tokens):
    """Compute the same function from its formulas, for each head and each position singly."""

    def norm(x, name):
        rms = torch.sqrt((x * x).mean(-1, keepdim=True) + spec.norm_eps)
        return x / rms * weights[name + ".weight"]

    def rotate(x, t):
        half = spec.head_dim // 2
        angle = t * spec.rope_theta ** (-torch.arange(half).double() * 2 / spec.head_dim)
        pairs = torch.complex(x[:half], x[half:]) * torch.polar(torch.ones(half).double(), angle)
        return torch.cat((pairs.real, pairs.imag))

    def head(x, matrix, number):
        size = spec.head_dim
        return weights[matrix + ".weight"][number * size : (number + 1) * size] @ x

    def attend(xs, block):
        rows = []
        for t in range(len(xs)):
            outputs = []
            for h in range(spec.num_heads):
                group = h // spec.group_size
                q = rotate(head(xs[t], block + ".q", h), t)
                keys = [rotate(head(xs[s], block + ".k", group), s) for s in range(t + 1)]
                values = [head(xs[s], block + ".v", group) for s in range(t + 1)]
                scale = spec.attention_multiplier / math.sqrt(spec.head_dim)
                scores = torch.stack([q @ k for k in keys]) * scale
                outputs.append(torch.softmax(scores, 0) @ torch.stack(values))
            rows.append(weights[block + ".o.weight"] @ torch.cat(outputs))
        return torch.stack(rows)

    x = weights["embedding.weight"][tokens] * spec.embedding_multiplier
    for number in range(spec.depth):
        block = f"blocks.{number}"
        x = x + attend(norm(x, f"{block}.attention_norm"), f"{block}.attention")
        h = norm(x, f"{block}.ffn_norm")
        gate, up = (
            h @ weights[f"{block}.ffn.gate.weight"].T,
            h @ weights[f"{block}.ffn.up.weight"].T,
        )
        x = x + (F.silu(gate) * up) @ weights[f"{block}.ffn.down.weight"].T
    logits = norm(x, "final_norm") @ weights["unembedding.weight"].T
    return logits * spec.output_multiplier / spec.width_multiplier


@pytest.mark.parametrize("group_size", [1, 2])
def test_logits_are_their_formula(group_size):
    spec = ModelSpec(
        width=16,
        depth=2,
        head_dim=4,
        group_size=group_size,
        vocab_size=11,
        base_width=8,
        embedding_multiplier=1.5,
        output_multiplier=3.0,
        attention_multiplier=0.7,
    )
    model, tokens = model_of(spec), tokens_of(spec, batch=1)
    expected = reference_logits(model.state_dict(), spec, tokens[0])
    # The RoPE table of the model is in float32, and the formulas are in float64.
    assert torch.allclose(model(tokens)[0], expected, rtol=1e-6, atol=1e-8)


def test_a_fresh_model_knows_nothing_and_says_so():
    spec = ModelSpec(width=16, depth=2, head_dim=8)
    model = init_weights_(Decoder(spec, context=8), spec, seeded())
    assert loss_nats(model, tokens_of(spec, length=9)).item() == pytest.approx(math.log(256), 1e-6)


def test_initialisation_is_a_function_of_its_generator_and_leaves_the_global_one_alone():
    spec = ModelSpec(width=16, depth=1, head_dim=8, unembedding_std=0.1)
    before = torch.get_rng_state()
    one, same, other = (init_weights_(Decoder(spec, context=8), spec, seeded(s)) for s in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, same.state_dict()[name])
        assert torch.equal(tensor, other.state_dict()[name]) == (role_of(name) in GAINS)


def test_a_shorter_window_gives_the_same_logits():
    spec = ModelSpec(width=16, depth=2, head_dim=8, vocab_size=11)
    model, tokens = model_of(spec), tokens_of(spec)
    assert torch.allclose(model(tokens[:, :5]), model(tokens)[:, :5], rtol=1e-12)


def test_bfloat16_trains_to_about_the_same_loss():
    spec = ModelSpec(width=32, depth=2, head_dim=8, unembedding_std=0.1)
    model, window = (
        init_weights_(Decoder(spec, context=16), spec, seeded()),
        tokens_of(spec, length=13),
    )
    exact = loss_nats(model, window).item()
    rounded = loss_nats(model.bfloat16(), window)
    rounded.backward()
    assert rounded.item() == pytest.approx(exact, rel=0.02)
    assert all(p.grad.isfinite().all() for p in model.parameters())
