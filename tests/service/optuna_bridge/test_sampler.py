"""The sampler: every algorithm searches, a restart repeats no sample, and the first end counts."""

import math
import subprocess
import sys

import pytest

from service.database.engine import optuna_url
from service.optuna_bridge.sampler import Sampler
from service.specs.study import StudySpec
from tests.by_hand import end_trial, report_losses, start_trial

SPACE = {
    "lr": {"type": "float", "low": 1e-3, "high": 3e-2, "log": True},
    "beta2": {"type": "float", "low": 0.9, "high": 0.98, "step": 0.02},
    "batch_size": {"type": "int", "low": 4, "high": 16, "step": 4},
}


@pytest.fixture
def make(database_url):
    samplers = []

    def new():
        samplers.append(Sampler(optuna_url(database_url), pool_size=2))
        return samplers[-1]

    yield new
    for sampler in samplers:
        sampler.close()


@pytest.fixture
def spec(study_spec):
    def build(sampler="random", trials=12, pruner="none", space=SPACE, seed=0):
        hpo = {"trials": trials, "sampler": sampler, "pruner": pruner, "seed": seed}
        return StudySpec.model_validate(study_spec(hpo=hpo, search_space=space, target=None))

    return build


def search(sampler, spec, n):
    """Start and finish `n` trials; the loss is least at lr = 0.01."""
    asked = []
    for _ in range(n):
        suggestion = start_trial(sampler, spec.name, spec)
        loss = abs(math.log(suggestion.params["lr"] / 0.01))
        end_trial(sampler, spec.name, suggestion.number, "succeeded", loss)
        asked.append(suggestion)
    return asked


@pytest.mark.parametrize("name", ["random", "tpe", "cmaes", "gp", "qmc"])
def test_every_sampler_stays_in_its_space_and_repeats_nothing(make, spec, name):
    sampler, study = make(), spec(name)
    sampler.create_study(study.name)
    asked = search(sampler, study, 12)
    assert [s.number for s in asked] == list(range(12))
    for suggestion in asked:
        assert 1e-3 <= suggestion.params["lr"] <= 3e-2
        assert suggestion.params["batch_size"] in (4, 8, 12, 16)
        assert min(abs(suggestion.params["beta2"] - b / 100) for b in range(90, 99, 2)) < 1e-9
    # The learning rate is continuous, so equal values would be a repetition.
    assert len({s.params["lr"] for s in asked}) == 12


def test_tpe_finds_the_minimum_better_than_chance(make, spec):
    sampler, study = make(), spec("tpe", trials=30)
    sampler.create_study(study.name)
    late = search(sampler, study, 30)[15:]
    near = sum(abs(math.log(s.params["lr"] / 0.01)) < math.log(2) for s in late)
    # Random search would find 6 of 15 within a factor of 2 of the minimum.
    assert near >= 10


def test_a_grid_visits_every_point_once_and_its_end_is_no_error(make, spec):
    space = {
        "lr": {"type": "categorical", "choices": [0.001, 0.002, 0.004]},
        "batch_size": {"type": "int", "low": 4, "high": 8, "step": 4},
    }
    sampler, study = make(), spec("grid", trials=6, space=space)
    sampler.create_study(study.name)
    points = {tuple(s.params.values()) for s in search(sampler, study, 6)}
    assert len(points) == 6
    assert {state for state, _ in sampler.read_states(study.name).values()} == {"COMPLETE"}


@pytest.mark.parametrize("name", ["random", "tpe", "cmaes", "qmc"])
def test_a_restart_does_not_repeat_the_draws_before_it(make, spec, name):
    study = spec(name)
    make().create_study(study.name)
    # Each `make()` is a new sampler, as after a restart of the service.
    before = search(make(), study, 5)
    after = search(make(), study, 5)
    drawn = [s.params["lr"] for s in before + after]
    assert len(set(drawn)) == 10


def test_the_same_seed_draws_the_same_trials(make, spec):
    sampler = make()
    same, again, other = spec(seed=3), spec(seed=3), spec(seed=4)
    for study in (same, again, other):
        sampler.create_study(study.name)
    drawn = [[s.params for s in search(sampler, study, 4)] for study in (same, again, other)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_gp_runs_without_torch_in_the_service(database_url, spec):
    study = spec("gp", trials=4)
    program = """
import sys
import optuna
from service.optuna_bridge.sampler import Sampler
from service.specs.study import StudySpec
from tests.by_hand import start_trial
if __name__ == "__main__":
    spec = StudySpec.model_validate_json(sys.argv[2])
    sampler = Sampler(sys.argv[1])
    sampler.create_study(spec.name)
    for n in range(4):
        s = start_trial(sampler, spec.name, spec)
        study = optuna.load_study(study_name=spec.name, storage=sampler.storage)
        study.tell(s.number, s.params["lr"])
    sampler.close()
    assert "torch" not in sys.modules
    print("no torch")
"""
    arguments = [sys.executable, "-c", program, optuna_url(database_url), study.model_dump_json()]
    assert (
        "no torch" in subprocess.run(arguments, capture_output=True, text=True, check=True).stdout
    )


@pytest.mark.parametrize("pruner", ["median", "successive_halving", "hyperband"])
def test_every_pruner_stops_the_worst_and_keeps_the_best(make, spec, pruner):
    sampler, study = make(), spec(pruner=pruner, trials=24)
    sampler.create_study(study.name)
    stopped = {}
    # Trial n has the constant loss n: the first trial is the best.
    for loss in [*range(24)]:
        number = start_trial(sampler, study.name, study).number
        stopped[loss] = False
        for evaluation in range(1, study.train.evaluations + 1):
            report_losses(sampler, study.name, number, {evaluation: float(loss)})
            stopped[loss] |= sampler.should_prune(study.name, study, number)
        end_trial(
            sampler, study.name, number, "pruned" if stopped[loss] else "succeeded", float(loss)
        )
    assert not stopped[0]
    assert sum(stopped.values()) >= 6


def test_telling_twice_keeps_the_first_end(make, spec):
    sampler, study = make(), spec()
    sampler.create_study(study.name)
    number = start_trial(sampler, study.name, study).number
    end_trial(sampler, study.name, number, "succeeded", 2.0)
    end_trial(sampler, study.name, number, "failed", None)
    assert sampler.read_states(study.name) == {number: ("COMPLETE", 2.0)}


def test_a_trial_that_diverged_before_any_report_is_pruned_at_infinity(make, spec):
    sampler, study = make(), spec()
    sampler.create_study(study.name)
    number = start_trial(sampler, study.name, study).number
    end_trial(sampler, study.name, number, "diverged", None)
    assert sampler.read_states(study.name) == {number: ("PRUNED", math.inf)}
