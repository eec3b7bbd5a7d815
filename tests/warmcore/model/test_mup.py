"""muP's table of factors, and activations that do not depend on width."""

import math

import pytest

from warmcore.coord_check.check import CheckSetup, check_axis
from warmcore.model.mup import GAINS, factors, multipliers, role_of
from warmcore.specs import ModelSpec, TrainSpec
from warmcore.training.events import StepEvent
from warmcore.training.optimizer import ROLES
from warmcore.training.training import Training

FLAT = 0.05
CONTEXT = 32


def losses(training):
    return [e.loss_nats for e in training.train_to_end() if isinstance(e, StepEvent)]


def test_at_the_base_width_training_is_the_standard_twins_bit_for_bit(run_spec, corpus):
    mup = run_spec(parametrization="mup", base_width=16)
    standard = run_spec(parametrization="standard")
    assert losses(Training.start(mup, corpus)) == losses(Training.start(standard, corpus))


# The negative control: equality at the base would prove nothing if it held everywhere.
def test_away_from_the_base_width_training_is_not_the_standard_twins(run_spec, corpus):
    mup = run_spec(parametrization="mup", base_width=8)
    standard = run_spec(parametrization="standard")
    assert losses(Training.start(mup, corpus)) != losses(Training.start(standard, corpus))


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize(("parametrization", "base_width"), [("mup", 64), ("standard", 16)])
def test_every_factor_is_one_at_the_base_width_and_under_standard(
    role, parametrization, base_width
):
    model = ModelSpec(
        width=64, depth=1, head_dim=16, base_width=base_width, parametrization=parametrization
    )
    row = factors(role, model)
    assert (row.lr, row.eps, row.weight_decay) == (1, 1, 0 if role in GAINS else 1)
    std = {"embedding": model.embedding_std, "hidden": model.init_std} | dict.fromkeys(GAINS, 0)
    assert row.init_std == std.get(role, model.unembedding_std)
    assert multipliers(model).logits == 1


def test_the_table_at_four_times_the_base_width():
    model = ModelSpec(width=256, depth=1, base_width=64, unembedding_std=0.5)
    rows = {role: factors(role, model) for role in ROLES}
    assert [rows[r].lr for r in ROLES] == [1, 1 / 4, 1, 1, 1]
    assert [rows[r].weight_decay for r in ROLES] == [1, 4, 0, 0, 1]
    assert [rows[r].eps for r in ROLES] == [1 / 4] * 5
    assert rows["hidden"].init_std == model.init_std / 2
    assert rows["unembedding"].init_std == 0.5
    assert multipliers(model).logits == 1 / 4
    assert multipliers(model).attention == 1 / math.sqrt(model.head_dim)


def test_a_name_outside_the_family_has_no_role():
    with pytest.raises(ValueError, match=r"blocks\.0\.bias is not the name of a tensor"):
        role_of("blocks.0.bias")


@pytest.fixture(scope="module")
def slopes_of(corpus):
    def measure(parametrization, num_seeds):
        model = ModelSpec(
            width=128, depth=2, head_dim=16, base_width=128, parametrization=parametrization
        )
        setup = CheckSetup(
            tokens=corpus.train,
            train=TrainSpec(lr=4e-3, batch_size=8),
            context=CONTEXT,
            num_steps=3,
            num_seeds=num_seeds,
        )
        # At width 64, effects of finite width are still 5 % of an activation.
        return check_axis(setup, model, "width", (128, 256, 512)).last_slopes

    return measure


def test_under_mup_activations_do_not_depend_on_width(slopes_of):
    measured = slopes_of("mup", num_seeds=8)
    assert all(abs(slope) < FLAT for slope in measured.values()), measured


def test_under_standard_parametrization_activations_grow_with_width(slopes_of):
    measured = slopes_of("standard", num_seeds=2)
    assert all(measured[kind] > 4 * FLAT for kind in ("attention", "ffn", "unembedding")), measured
