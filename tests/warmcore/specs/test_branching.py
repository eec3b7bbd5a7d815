"""A branch equals the run of its budget, although a trunk trained most of its steps."""

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from warmcore.checkpoint.checkpoint import CheckpointCorruptError
from warmcore.specs import CheckpointRef, GrowthSpec, RunSpec
from warmcore.specs.run import make_branch
from warmcore.specs.schedule import count_warmup_steps, lr_factor
from warmcore.training.events import EvaluationEvent
from warmcore.training.optimizer import optimizer_tensors
from warmcore.training.training import Training

BUDGETS = (0.05, 0.1, 0.15)  # 9, 18 and 27 steps of the model below
PLACE = CheckpointRef(uri="trunk", hash="0" * 64)


def drop_times(events):
    return [dataclasses.replace(event, seconds=0.0) for event in events]


def assert_equal_state(first, second):
    for tensors in (lambda t: t.model.state_dict(), lambda t: optimizer_tensors(t.optimizer)):
        a, b = tensors(first), tensors(second)
        assert a.keys() == b.keys()
        for name in a:
            assert torch.equal(a[name], b[name]), name
    assert first.progress == second.progress


@pytest.fixture(scope="module")
def trunk_spec(run_spec):
    """Spec of a trunk; keywords go where `run_spec` puts them."""

    # `run_spec` gives a budget in tokens, and a trunk has budgets in tokens per parameter.
    def make(*, branches=BUDGETS, growth=None, **fields):
        train = {"evaluations": 4, "cooldown_fraction": 0.4, "warmup_fraction": 0.1} | fields
        whole = run_spec(growth=growth, **train).model_dump()
        whole["train"] |= {"num_tokens": None}
        return RunSpec.model_validate(whole | {"branches": branches})

    return make


@pytest.fixture(scope="module")
def base(run_spec, corpus, tmp_path_factory):
    training = Training.start(run_spec(steps=10), corpus)
    list(training.train_to_end())
    return training.save(tmp_path_factory.mktemp("base") / "checkpoint")


@pytest.fixture(scope="module", params=["cold", "warm"])
def grown_trunk(request, trunk_spec, base):
    """The spec of a trunk, and the path of the checkpoint that it grows from, or None."""
    if request.param == "cold":
        return trunk_spec(ema_half_life=0.1, swa_fraction=0.4), None
    growth = GrowthSpec(base=CheckpointRef(uri=str(base.path), hash=base.hash))
    wide = {"width": 32, "base_width": 16, "branches": (0.03, 0.06)}
    return trunk_spec(growth=growth, **wide), base.path


@pytest.fixture(scope="module")
def checkpoints(grown_trunk, corpus, tmp_path_factory):
    """The trunk's checkpoint of each budget."""
    spec, base = grown_trunk
    folder = tmp_path_factory.mktemp("trunk")
    training = Training.start(spec, corpus, base=base)
    saved = {}
    for event in training.train_to_end():
        if isinstance(event, EvaluationEvent) and event.step in spec.branch_steps:
            saved[event.step] = training.save(folder / str(event.step))
    return {budget: saved[step] for budget, step in zip(spec.branches, saved, strict=True)}


def make_ref(saved):
    return CheckpointRef(uri=str(saved.path), hash=saved.hash)


def events_after(events, step):
    return [event for event in drop_times(events) if event.step > step]


def test_a_branch_is_the_uninterrupted_run_of_its_budget_bit_for_bit(
    grown_trunk, checkpoints, corpus
):
    spec, base = grown_trunk
    for budget, saved in checkpoints.items():
        whole = Training.start(make_branch(spec, budget, None), corpus, base=base)
        expected = events_after(whole.train_to_end(), saved.step)
        branch = Training.start(make_branch(spec, budget, make_ref(saved)), corpus, base=saved.path)
        assert branch.step == saved.step
        assert drop_times(branch.train_to_end()) == expected
        # An event for each step, and evaluations on top.
        assert len(expected) > whole.spec.num_steps - saved.step
        assert_equal_state(branch, whole)
        assert branch.base_hash == whole.base_hash


def test_a_run_with_a_warmup_of_its_own_is_not_the_branch(grown_trunk, checkpoints, corpus):
    """Negative control: with another warmup the law does not hold."""
    spec, base = grown_trunk
    budget, saved = next(iter(checkpoints.items()))
    own = make_branch(spec, budget, None)
    other = own.model_copy(update={"train": own.train.model_copy(update={"warmup_steps": None})})
    branch = Training.start(make_branch(spec, budget, make_ref(saved)), corpus, base=saved.path)
    curve = drop_times(branch.train_to_end())
    assert count_warmup_steps(other.budget_steps, other.train) != own.train.warmup_steps
    assert (
        events_after(Training.start(other, corpus, base=base).train_to_end(), saved.step) != curve
    )


def test_a_branch_resumed_at_any_event_is_the_uninterrupted_one(
    grown_trunk, checkpoints, corpus, tmp_path
):
    budget, saved = next(iter(checkpoints.items()))
    spec = make_branch(grown_trunk[0], budget, make_ref(saved))
    expected = drop_times(Training.start(spec, corpus, base=saved.path).train_to_end())
    # Stop after every event in turn: steps, evaluations and the end.
    for num_taken in range(len(expected)):
        first = Training.start(spec, corpus, base=saved.path)
        taken = drop_times(itertools.islice(first.train_to_end(), num_taken))
        second = Training.resume(spec, corpus, first.save(tmp_path / str(num_taken)).path)
        assert taken + drop_times(second.train_to_end()) == expected


def test_the_largest_budgets_branch_is_the_run_that_has_no_trunk_at_all(trunk_spec):
    spec = trunk_spec()
    alone = spec.train.model_copy(update={"tokens_per_param": BUDGETS[-1]})
    whole = make_branch(spec, BUDGETS[-1], None)
    assert whole.num_steps == spec.budget_steps
    for step in range(whole.num_steps):
        assert lr_factor(step, whole.num_steps, whole.train) == lr_factor(
            step, whole.num_steps, alone
        )


@given(
    cooldown=st.floats(0.01, 0.9),
    warmup=st.floats(0, 0.05),
    batch_size=st.sampled_from([1, 4, 16]),
    budgets=st.lists(st.floats(0.5, 40), min_size=2, max_size=4, unique=True).map(sorted),
)
def test_trunk_and_branch_agree_on_every_step_before_the_cooldown(
    trunk_spec, cooldown, warmup, batch_size, budgets
):
    fields = {"cooldown_fraction": cooldown, "warmup_fraction": warmup, "batch_size": batch_size}
    try:
        spec = trunk_spec(branches=budgets, **fields)
    except ValidationError:
        return  # too close to each other, or to the warmup
    horizon, ends = spec.budget_steps, spec.branch_steps
    assert ends[-1] == spec.num_steps
    for budget, start in zip(budgets, ends, strict=True):
        branch = make_branch(spec, budget, PLACE)
        assert branch.start_step == start < branch.num_steps
        # The ends of the phases, and a step in the constant phase.
        for step in {0, count_warmup_steps(horizon, spec.train), start // 2, start - 1}:
            own = lr_factor(step, branch.num_steps, branch.train)
            assert own == lr_factor(step, horizon, spec.train)
        assert lr_factor(start - 1, horizon, spec.train) == 1
        assert lr_factor(start, branch.num_steps, branch.train) < 1
        past = {step for step in branch.evaluation_steps if step <= start}
        assert past | {start} <= set(spec.evaluation_steps)


def test_a_trunk_ends_where_its_last_budget_cools_down(trunk_spec, corpus):
    spec = trunk_spec()
    *_, last = Training.start(spec, corpus).train_to_end()
    assert spec.branch_steps == (6, 11, 16)
    assert (last.step, last.evaluation) == (16, len(spec.evaluation_steps) - 1)


@pytest.mark.parametrize(
    ("fields", "where", "message"),
    [
        ({"branches": (5,)}, "branches", "give two, or train.tokens_per_param 5"),
        ({"branches": (5, 2)}, "branches", r"\[2, 5\] would"),
        ({"branches": (5, 5)}, "branches", r"must ascend"),
        ({"branches": (5, 0)}, "branches.1", "greater than 0"),
        ({"branches": (5, 5.001)}, "branches", "the same step 542; budgets further apart"),
        ({"branches": (0.01, 5)}, "branches", "step 1, in the warmup of 91 steps"),
        ({"schedule": "cosine"}, "branches", "cosine with cooldown_fraction 0.4 cannot branch"),
        ({"cooldown_fraction": 0.0}, "branches", "wsd with a cooldown_fraction above 0 can"),
        ({"swa_fraction": 0.5}, "branches", "before the cooldown of its branch; 0.4 or less"),
        ({"evaluations": 5000}, "branches", "train.evaluations 5000: 3333 at most"),
    ],
)
def test_budgets_that_cannot_share_a_trunk_are_refused(trunk_spec, fields, where, message):
    with pytest.raises(ValidationError, match=message) as refused:
        trunk_spec(**fields)
    (problem,) = refused.value.errors()
    assert ".".join(map(str, problem["loc"])) == where


def test_a_budget_in_tokens_and_a_trunk_of_a_branch_are_refused(trunk_spec, run_spec):
    fields = run_spec(steps=20).model_dump()
    with pytest.raises(ValidationError, match=r"train\.num_tokens 1280 is a budget too"):
        RunSpec.model_validate(fields | {"branches": BUDGETS})
    branch = make_branch(trunk_spec(), BUDGETS[0], PLACE)
    with pytest.raises(ValidationError, match="is a branch itself"):
        RunSpec.model_validate(branch.model_dump() | {"branches": BUDGETS})
    with pytest.raises(ValueError, match=r"no branch at 7 tokens per parameter but 0\.05, 0\.1"):
        make_branch(trunk_spec(), 7.0, PLACE)


def test_a_warmup_in_steps_that_leaves_no_room_is_refused(run_spec):
    fits = run_spec(steps=20, warmup_steps=16)
    assert [lr_factor(step, 20, fits.train) for step in (0, 15)] == [1 / 16, 1]
    with pytest.raises(ValidationError, match=r"train\.warmup_steps 17: .* 16 or fewer work"):
        run_spec(steps=20, warmup_steps=17)


def test_a_checkpoint_that_is_not_this_branchs_trunk_is_refused(
    trunk_spec, corpus, checkpoints, grown_trunk, base
):
    spec = grown_trunk[0]
    first, second = list(checkpoints.items())[:2]
    branch = make_branch(spec, first[0], make_ref(first[1]))
    with pytest.raises(CheckpointCorruptError):
        Training.start(branch, corpus, base=second[1].path)
    wrong_step = make_branch(spec, first[0], make_ref(second[1]))
    with pytest.raises(ValueError, match=f"is at step {second[1].step}, not {first[1].step}"):
        Training.start(wrong_step, corpus, base=second[1].path)
    # With another learning rate the trunk's steps would have been different.
    hotter = branch.model_copy(update={"train": branch.train.model_copy(update={"lr": 0.5})})
    with pytest.raises(ValueError, match=r"another run's trunk: train\.lr is 0\.012, not 0\.5"):
        Training.start(hotter, corpus, base=first[1].path)
    # A checkpoint of a run without branches.
    no_trunk = branch.model_copy(update={"trunk": make_ref(base)})
    with pytest.raises(ValueError, match=r"no branch at .* but no budget at all"):
        Training.start(no_trunk, corpus, base=base.path)
    with pytest.raises(ValueError, match="give both"):
        Training.start(branch, corpus)
