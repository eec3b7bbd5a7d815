"""Cached steps of a spec are invisible: equality, hashes, copies and dumps do not see them."""

import copy
import pickle

import pytest

from warmcore.specs import RunSpec
from warmcore.specs.branching import select_branch_losses
from warmcore.specs.run import _find_branch_steps, _find_evaluation_steps, make_branch

MODEL = {"width": 32, "depth": 1, "head_dim": 16}
FIELDS = {
    "run": {},
    "trunk": {"branches": (1.0, 2.0)},
    "branch": {"trunk": {"uri": "trunk", "hash": "0" * 64}},
    "grown": {"growth": {"base": {"uri": "base", "hash": "0" * 64}}},
}


# A step that an earlier test computed would hide that a spec keeps it.
@pytest.fixture(autouse=True)
def empty_caches():
    _find_branch_steps.cache_clear()
    _find_evaluation_steps.cache_clear()


def make(kind, **fields):
    data = {"source": "stdlib", "context": 32}
    return RunSpec.model_validate({"model": MODEL, "data": data} | FIELDS[kind] | fields)


@pytest.fixture(params=FIELDS)
def specs(request):
    """Two equal specs; the steps of the second have been asked for."""
    fresh, used = make(request.param), make(request.param)
    assert used.evaluation_steps[-1] == used.num_steps
    assert len(used.branch_steps) == len(used.branches)
    return fresh, used


@pytest.mark.parametrize(
    "look",
    [
        hash,
        repr,
        dict,
        vars,
        pickle.dumps,
        RunSpec.model_dump,
        RunSpec.model_dump_json,
        lambda spec: vars(copy.copy(spec)),
        lambda spec: vars(copy.deepcopy(spec)),
        lambda spec: vars(spec.model_copy(update={"seed": 1})),
        lambda spec: spec.model_fields_set,
    ],
)
def test_steps_that_have_been_asked_for_are_seen_nowhere(specs, look):
    fresh, used = specs
    assert look(fresh) == look(used)


def test_a_spec_equals_another_whose_steps_have_been_asked_for(specs):
    fresh, used = specs
    assert fresh == used
    assert used == fresh
    assert {fresh: "steps"}[used] == "steps"
    assert pickle.loads(pickle.dumps(used)) == fresh  # noqa: S301 - our own bytes


def test_the_fields_of_a_spec_make_it_again(specs):
    fresh, used = specs
    assert RunSpec.model_validate(dict(used)) == fresh
    assert list(dict(used)) == list(RunSpec.model_fields)


@pytest.mark.parametrize("kind", FIELDS)
def test_a_changed_copy_has_steps_of_its_own(kind):
    spec = make(kind)
    before = spec.branch_steps, spec.evaluation_steps
    train = spec.train.model_copy(update={"batch_size": 4, "evaluations": 3})
    changed = spec.model_copy(update={"train": train})
    expected = make(kind, train={"batch_size": 4, "evaluations": 3})
    assert (changed.branch_steps, changed.evaluation_steps) == (
        expected.branch_steps,
        expected.evaluation_steps,
    )
    assert changed.evaluation_steps != before[1]
    assert (spec.branch_steps, spec.evaluation_steps) == before
    # Without branches the trunk is an ordinary run.
    whole = spec.model_copy(update={"branches": ()})
    assert whole.branch_steps == ()


def test_steps_are_computed_once_for_equal_specs():
    for _ in range(3):
        spec = make("trunk")
        assert spec.evaluation_steps is spec.evaluation_steps
        assert spec.branch_steps is spec.branch_steps
    assert _find_evaluation_steps.cache_info().misses == 3  # the trunk and its two branches
    assert _find_branch_steps.cache_info().misses == 1  # in the validator of `branches`


def test_a_branch_keeps_the_losses_that_it_would_have_measured():
    trunk = make("trunk")
    # Each loss is the number of its step.
    losses = [float(step) for step in trunk.evaluation_steps]
    for budget, start in zip(trunk.branches, trunk.branch_steps, strict=True):
        branch = make_branch(trunk, budget, None)
        past = [loss for loss in losses if loss <= start]
        kept = select_branch_losses(past, trunk.evaluation_steps, branch.evaluation_steps)
        assert kept == tuple(float(s) for s in branch.evaluation_steps if s <= start)
