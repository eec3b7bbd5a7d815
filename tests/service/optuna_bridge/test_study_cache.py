"""The study cache is bounded, and an eviction changes no sample."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import text

from service.optuna_bridge import study_cache
from service.specs.study import StudySpec
from tests.by_hand import end_trial, report_losses, start_trial


@pytest.fixture
def studies(sampler, study_spec):
    def make(n):
        hpo = {"trials": 40, "sampler": "tpe", "pruner": "median"}
        specs = [StudySpec.model_validate(study_spec(hpo=hpo, target=None)) for _ in range(n)]
        for spec in specs:
            sampler.create_study(spec.name)
        return specs

    return make


def search(sampler, spec, n):
    """Start, evaluate, ask the pruner and finish `n` trials; return their parameters."""
    drawn = []
    for _ in range(n):
        suggestion = start_trial(sampler, spec.name, spec)
        loss = suggestion.params["lr"]
        report_losses(sampler, spec.name, suggestion.number, {1: loss})
        sampler.should_prune(spec.name, spec, suggestion.number)
        end_trial(sampler, spec.name, suggestion.number, "succeeded", loss)
        drawn.append(suggestion.params)
    return drawn


def test_no_more_studies_are_known_than_there_may_be(sampler, studies, monkeypatch):
    monkeypatch.setattr(study_cache, "_MAX_STUDIES", 3)
    specs = studies(5)
    for spec in specs:
        search(sampler, spec, 1)
    # Study 2 is used again, so study 3 is evicted before it.
    search(sampler, specs[2], 1)
    search(sampler, specs[0], 1)
    assert [*sampler._cache._studies] == [specs[i].name for i in (4, 2, 0)]
    # Optuna's own cache of a study is evicted together with the study.
    cached = [study.storage._studies for study in sampler._cache._studies.values()]
    assert [len(studies) for studies in cached] == [1, 1, 1]
    assert not any(study.trials for study in sampler.storage._studies.values())


def test_no_more_trials_are_known_than_there_may_be_but_one_study_always_is(
    sampler, studies, monkeypatch
):
    monkeypatch.setattr(study_cache, "_MAX_TRIALS", 6)
    first, second, large = studies(3)
    search(sampler, first, 3)
    search(sampler, second, 3)
    assert [*sampler._cache._studies] == [first.name, second.name]
    # 8 trials exceed the limit of 6: the other studies are evicted, the study in use stays.
    search(sampler, large, 8)
    assert [*sampler._cache._studies] == [large.name]


def test_what_is_forgotten_draws_as_if_it_had_not_been(sampler, studies, monkeypatch):
    same, other = studies(2)
    expected = search(sampler, same, 16)
    monkeypatch.setattr(study_cache, "_MAX_STUDIES", 1)
    params = []
    for _ in range(16):
        # Each use of a study evicts the other study.
        params += search(sampler, other, 1)
        sampler._cache.get_study(same.name)
    assert params == expected


def test_studies_are_forgotten_under_draws_that_run(sampler, studies, monkeypatch):
    monkeypatch.setattr(study_cache, "_MAX_STUDIES", 1)
    specs = studies(4)
    with ThreadPoolExecutor(4) as pool:
        drawn = [*pool.map(lambda spec: search(sampler, spec, 8), specs)]
    assert [len(params) for params in drawn] == [8] * 4
    assert len(sampler._cache) == 1
    for spec in specs:
        states = sampler.read_states(spec.name)
        assert sorted(states) == [*range(8)]
        assert {state for state, _ in states.values()} <= {"COMPLETE", "PRUNED"}


@pytest.mark.tampers
def test_a_study_that_went_back_in_time_is_read_anew_at_once(api, submit, worker, monkeypatch):
    """A promoted standby can lack the last commits: the test deletes the newest trial."""
    name = submit(hpo={"trials": 8, "parallel": 8, "sampler": "random", "pruner": "none"})["name"]
    for lease in worker.lease(3):
        worker.complete(lease)
    with api.engine.begin() as connection:
        assert len(api.sampler._cache.get_study(name).history.read_trials(connection)) == 3
        connection.execute(text("DELETE FROM warmscale.checkpoints"))
        connection.execute(text("DELETE FROM warmscale.runs WHERE trial_number = 2"))
        connection.execute(text("DELETE FROM optuna.trial_params WHERE trial_id = 3"))
        connection.execute(text("DELETE FROM optuna.trial_values WHERE trial_id = 3"))
        connection.execute(text("DELETE FROM optuna.trials WHERE trial_id = 3 AND number = 2"))
    # The first sampling finds the loss and evicts the study; the second reads it again.
    draws, draw = [], api.sampler.sample_trials

    def counted(*arguments):
        draws.append(arguments)
        return draw(*arguments)

    monkeypatch.setattr(api.sampler, "sample_trials", counted)
    assert worker.lease_one(study=name).trial_number == 2
    assert len(draws) == 2
