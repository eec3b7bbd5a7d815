"""TPE with a memory draws what Optuna's draws, whatever the history and however it grows."""

import math
import random

import optuna
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import TPESampler
from optuna.trial import TrialState, create_trial

from service.optuna_bridge.cached_tpe import Memory, RememberingTPESampler

KINDS = {
    "lr": FloatDistribution(1e-5, 1e-1, log=True),
    "decay": FloatDistribution(0.0, 0.3),
    "beta": FloatDistribution(0.9, 0.98, step=0.02),
    "batch": IntDistribution(4, 16, step=4),
    "width": IntDistribution(16, 512, log=True),
    "kind": CategoricalDistribution((1, 2, 4)),
}
ENDS = [TrialState.COMPLETE, TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL]
MOSTLY_PRUNED = [TrialState.PRUNED] * 40 + [TrialState.COMPLETE]  # so that pruned ones rank too


def value_in(kind, chance):
    if isinstance(kind, CategoricalDistribution):
        return chance.choice(kind.choices)
    if isinstance(kind, IntDistribution):
        return chance.randrange(kind.low, kind.high + 1, kind.step)
    steps = round((kind.high - kind.low) / kind.step) if kind.step else 0
    return (
        kind.low + chance.randint(0, steps) * (kind.step or 0)
        if steps
        else chance.uniform(kind.low, kind.high)
    )


def trial(chance, ends, *, constrained):
    """A trial of any end; losses and scores repeat, as ties must be broken alike."""
    state = chance.choice([*ends, TrialState.RUNNING])
    names = [n for n in KINDS if state != TrialState.RUNNING or chance.random() < 0.9]
    heard = {s: chance.choice([1.0, 2.0, math.inf, math.nan]) for s in range(chance.randrange(4))}
    return create_trial(
        state=state,
        params={n: value_in(KINDS[n], chance) for n in names},
        distributions={n: KINDS[n] for n in names},
        value=chance.randrange(8) / 4 if state == TrialState.COMPLETE else None,
        intermediate_values=heard,
        constraints={"c": chance.choice([-1.0, 1.0])} if constrained else None,
    )


def draw(study, sampler):
    study.sampler = sampler
    asked = study.ask()
    drawn = {name: asked._suggest(name, kind) for name, kind in KINDS.items()}
    study.tell(asked, state=TrialState.FAIL)
    return drawn


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.lists(st.integers(0, 60), min_size=1, max_size=4), st.booleans())
def test_every_draw_is_optunas_to_the_bit(seed, growth, constrained):
    chance = random.Random(seed)  # noqa: S311 - a scene, no secret
    study, memory = optuna.create_study(), Memory()
    ends = chance.choice([ENDS, MOSTLY_PRUNED])
    running = []
    for more in growth:
        for trial_id in running:  # what ran has ended meanwhile
            study._storage.set_trial_state_values(trial_id, TrialState.COMPLETE, [chance.random()])
        before = len(study.get_trials(deepcopy=False))
        study.add_trials([trial(chance, ends, constrained=constrained) for _ in range(more)])
        new = study.get_trials(deepcopy=False)[before:]
        running = [t._trial_id for t in new if t.state == TrialState.RUNNING]
        plain = draw(study, TPESampler(n_startup_trials=3, seed=seed))
        ours = draw(study, RememberingTPESampler(memory, n_startup_trials=3, seed=seed))
        assert ours == plain
