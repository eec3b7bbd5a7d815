"""Drafts: they equal Optuna's own samples, and all or none are written."""

import random

import optuna
import pytest
from optuna.samplers import CmaEsSampler, GridSampler, QMCSampler, RandomSampler, TPESampler
from optuna.trial import TrialState
from sqlalchemy import text
from sqlalchemy.orm import Session

from service.optuna_bridge.draft_storage import MovedOnError, write_drafts
from service.optuna_bridge.translation import make_distribution, make_pruner
from service.optuna_bridge.trial_history import TrialHistory
from service.specs.search_space import list_grid_points
from service.specs.study import StudySpec
from tests.by_hand import end_trial, report_losses, start_trial
from warmcore.specs import derive_seed

SPACE = {
    "lr": {"type": "float", "low": 1e-3, "high": 3e-2, "log": True},
    "weight_decay": {"type": "float", "low": 0.0, "high": 0.3},
    "beta2": {"type": "float", "low": 0.9, "high": 0.98, "step": 0.02},
    "batch_size": {"type": "int", "low": 4, "high": 16, "step": 4},
    "beta1": {"type": "categorical", "choices": [0.8, 0.9, 0.95]},
}
GRID = {"batch_size": SPACE["batch_size"], "beta1": SPACE["beta1"]}


@pytest.fixture
def spec(study_spec):
    def build(name, trials=12, pruner="none"):
        hpo = {"trials": trials, "sampler": name, "pruner": pruner, "seed": 5}
        space = GRID if name == "grid" else SPACE
        return StudySpec.model_validate(study_spec(hpo=hpo, search_space=space, target=None))

    return build


def plain(spec, trials_so_far):
    """Return Optuna's sampler without our code, with the seed of our sampler."""
    draw = derive_seed(spec.hpo.seed, "ask", trials_so_far) % 2**32
    startup = min(10, max(1, spec.hpo.trials // 3))
    match spec.hpo.sampler:
        case "random":
            return RandomSampler(seed=draw)
        case "tpe":
            return TPESampler(n_startup_trials=startup, seed=draw)
        case "cmaes":
            return CmaEsSampler(seed=draw, warn_independent_sampling=False)
        case "qmc":
            return QMCSampler(seed=5, scramble=True, warn_independent_sampling=False)
        case "grid":
            points = {name: list(list_grid_points(dim)) for name, dim in spec.search_space.items()}
            return GridSampler(points, seed=5)


class PlainOptuna:
    """The same study in memory, used as Optuna's manual shows: ask, then suggest."""

    def __init__(self, spec):
        self.spec, self.storage = spec, optuna.storages.InMemoryStorage()
        self.study = optuna.create_study(study_name=spec.name, storage=self.storage)
        self.study.pruner = make_pruner(spec)

    def ask(self):
        self.study.sampler = plain(self.spec, len(self.study.get_trials(deepcopy=False)))
        trial = self.study.ask()
        for name, dimension in self.spec.search_space.items():
            trial._suggest(name, make_distribution(dimension))
        return trial.number, trial.params

    def tell(self, number, state, value):
        if state == "pruned":
            trial_id = self.study.get_trials(deepcopy=False)[number]._trial_id
            self.storage.set_trial_intermediate_value(trial_id, 2, value)
        end = {"pruned": TrialState.PRUNED, "failed": TrialState.FAIL}.get(state)
        # As in our finish, no sampler takes part in `tell`.
        self.study.sampler = RandomSampler()
        self.study.tell(number, value if end is None else None, state=end)


def attributes(trial):
    """Return the attributes without the pruner's, and without TPE's note of unwritten samples."""
    other = ("tpe:relative", "completed_rung")
    return {k: v for k, v in trial.system_attrs.items() if not k.startswith(other)}


@pytest.mark.parametrize("pruner", ["none", "hyperband"])
@pytest.mark.parametrize("name", ["random", "tpe", "cmaes", "qmc", "grid"])
def test_a_study_draws_what_plain_optuna_draws(sampler, spec, name, pruner):
    study = spec(name, pruner=pruner)
    theirs = PlainOptuna(study)
    sampler.create_study(study.name)
    chance = random.Random(1)  # noqa: S311 - a test needs no secrets
    # Enqueued trials with some of their parameters; GridSampler takes none.
    for given in ({"lr": 0.002}, {"lr": 0.02, "batch_size": 8}):
        if name != "grid":
            sampler.enqueue_trial(study.name, given)
            theirs.study.enqueue_trial(given)
    running = []
    for _ in range(12):
        asked = start_trial(sampler, study.name, study)
        assert (asked.number, asked.params) == theirs.ask()
        running.append(asked.number)
        # Up to three trials keep running during the next ask.
        while len(running) > chance.randrange(4):
            number = running.pop(chance.randrange(len(running)))
            state = chance.choice(["succeeded", "succeeded", "pruned", "failed"])
            loss = chance.random()
            if state == "pruned":
                report_losses(sampler, study.name, number, {2: loss})
            end_trial(sampler, study.name, number, state, loss)
            theirs.tell(number, state, loss)
    study_id = sampler.storage.get_study_id_from_name(study.name)
    ours = sampler.storage.get_all_trials(study_id)
    with sampler.engine.connect() as connection:
        history = sampler._cache.get_study(study.name).history
        assert [*history.read_trials(connection).values()] == ours
        assert [*TrialHistory(study_id).read_trials(connection).values()] == ours
    for mine, other in zip(ours, theirs.study.trials, strict=True):
        assert list(mine.params.items()) == list(other.params.items())
        assert (mine.distributions, mine.state) == (other.distributions, other.state)
        assert mine.datetime_start is not None
        assert attributes(mine) == attributes(other)


def test_trials_drawn_together_are_those_drawn_one_after_another(sampler, spec):
    together, apart = spec("tpe"), spec("tpe")
    for study in (together, apart):
        sampler.create_study(study.name)
        for number in range(6):
            start_trial(sampler, study.name, study)
            end_trial(sampler, study.name, number, "succeeded", abs(number - 2.5))
    drafts = sampler.sample_trials(together.name, together, 4).drafts
    assert [d.params for d in drafts] == [
        start_trial(sampler, apart.name, apart).params for _ in range(4)
    ]
    assert len({d.params["lr"] for d in drafts}) == 4


def test_drafts_of_a_study_that_has_moved_on_are_not_written(sampler, spec):
    study = spec("random")
    sampler.create_study(study.name)
    stale = sampler.sample_trials(study.name, study)
    # Another trial starts between the sampling and the write.
    start_trial(sampler, study.name, study)
    with pytest.raises(MovedOnError), Session(sampler.engine) as session, session.begin():
        write_drafts(session, stale)
    assert len(sampler.read_states(study.name)) == 1


def test_an_enqueued_trial_that_another_has_started_is_not_started_again(sampler, spec):
    study = spec("random")
    sampler.create_study(study.name)
    sampler.enqueue_trial(study.name, {"lr": 0.01})
    stale = sampler.sample_trials(study.name, study)
    start_trial(sampler, study.name, study)
    with pytest.raises(MovedOnError), Session(sampler.engine) as session, session.begin():
        write_drafts(session, stale)


def test_what_is_rolled_back_leaves_nothing(sampler, spec):
    study = spec("qmc")
    sampler.create_study(study.name)
    drawn = sampler.sample_trials(study.name, study, 3)
    with Session(sampler.engine) as session:
        write_drafts(session, drawn)
        session.rollback()
        for table in ("trials", "trial_params", "study_system_attributes"):
            count = session.scalar(text(f"SELECT count(*) FROM optuna.{table}"))
            # The study's attribute is the metric's name, written when the study was created.
            assert count == (1 if table == "study_system_attributes" else 0)
    # The rollback left no trace: the same trials are sampled again.
    again = sampler.sample_trials(study.name, study, 3)
    assert [d.params for d in again.drafts] == [d.params for d in drawn.drafts]
