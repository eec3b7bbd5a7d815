"""Optuna's TPE with a memory: what each trial was drawn as is worked out once, not at every ask.

A sampler is made anew for every ask. At 10 000 trials Optuna's own then spends four fifths of its
time on finding the search space that all trials share, on ranking them, and on reading their
parameters again. All three only ever grow. The arithmetic is Optuna's: draws are equal to the bit.
"""

import math
from bisect import insort
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
from optuna import Study
from optuna.distributions import BaseDistribution
from optuna.samplers import TPESampler
from optuna.samplers._tpe.sampler import default_gamma
from optuna.search_space import IntersectionSearchSpace
from optuna.trial import FrozenTrial, TrialState

Floats = npt.NDArray[np.float64]
Row = tuple[float, ...]


class Memory:
    """Of one study: the search space of its trials, the finished ones by rank, and their rows."""

    def __init__(self) -> None:
        self.search_space = IntersectionSearchSpace(include_pruned=True)
        self.constrained = False
        self._known: set[int] = set()
        self._complete: list[tuple[float, int]] = []
        self._pruned: list[tuple[tuple[float, float], int]] = []
        self._numbers: list[int] = []
        self._rows: dict[tuple[str, ...], dict[int, Row | None]] = {}

    def learn(self, trials: Iterable[FrozenTrial]) -> None:
        """Note finished trials, each once."""
        for trial in trials:
            number = trial.number
            if number in self._known or trial.state == TrialState.RUNNING:
                continue
            self._known.add(number)
            insort(self._numbers, number)
            self.constrained = self.constrained or bool(trial.constraints)
            if trial.state == TrialState.COMPLETE:
                assert trial.value is not None
                insort(self._complete, (trial.value, number))
            else:
                insort(self._pruned, (_score(trial), number))

    def split(self, num_below: int) -> tuple[list[int], list[int]]:
        """The best trials' numbers and the others': complete ones first, earlier ones of equals."""
        complete = [number for _, number in self._complete[:num_below]]
        pruned = [number for _, number in self._pruned[: num_below - len(complete)]]
        below = {*complete, *pruned}
        return sorted(below), [number for number in self._numbers if number not in below]

    def rows(self, names: tuple[str, ...]) -> dict[int, Row | None]:
        """What trials were drawn as in this space, so far as known; None: not in all of it."""
        return self._rows.setdefault(names, {})


def _score(trial: FrozenTrial) -> tuple[float, float]:
    """How good a pruned trial was: the later it was pruned, and the lower its loss, the better."""
    if not trial.intermediate_values:
        return 1, 0.0
    step, value = max(trial.intermediate_values.items())
    return -step, math.inf if math.isnan(value) else value


class RememberingTPESampler(TPESampler):
    """`TPESampler` for a loss to be minimized, with a memory of its study's finished trials."""

    def __init__(self, memory: Memory, **options: Any) -> None:
        super().__init__(**options)
        self._memory = memory
        self._search_space = memory.search_space

    def _sample(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """As Optuna's, from what is remembered."""
        states = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)
        # Not get_trials(), which Hyperband narrows to a bracket: Optuna's own TPE sees them all.
        trials = study._get_trials(deepcopy=False, states=states)  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
        trials = [t for t in trials if t.number != trial.number]
        self._memory.learn(trials)
        if self._memory.constrained:
            return super()._sample(study, trial, search_space)
        running = [t.number for t in trials if t.state == TrialState.RUNNING]
        below, above = self._memory.split(default_gamma(len(trials) - len(running)))
        by_number = {t.number: t for t in trials}
        mpe_below, mpe_above = (
            self._parzen_estimator_cls(
                self._observations([by_number[n] for n in numbers], search_space, study),
                search_space,
                self._parzen_estimator_parameters,
            )
            for numbers in (below, sorted(above + running))
        )
        samples = mpe_below.sample(self._rng.rng, self._n_ei_candidates)
        values = self._compute_acquisition_func(samples, mpe_below, mpe_above)
        best = self._compare(samples, values)
        return {name: d.to_external_repr(best[name]) for name, d in search_space.items()}

    def _observations(
        self, trials: list[FrozenTrial], search_space: dict[str, BaseDistribution], study: Study
    ) -> dict[str, Floats]:
        """As `_get_internal_repr`: a row for every trial that has a value in all of the space."""
        known = self._memory.rows(tuple(search_space))
        rows: list[Row] = []
        for trial in trials:
            number = trial.number
            if number in known:
                row = known[number]
            else:
                row = self._row(trial, search_space, study)
                if trial.state.is_finished():
                    known[number] = row
            if row is not None:
                rows.append(row)
        values = np.array(rows, dtype=np.float64).reshape(len(rows), len(search_space))
        return {name: values[:, i] for i, name in enumerate(search_space)}

    def _row(
        self, trial: FrozenTrial, search_space: dict[str, BaseDistribution], study: Study
    ) -> Row | None:
        params = self._get_params(trial, study)
        if not search_space.keys() <= params.keys():
            return None
        return tuple(d.to_internal_repr(params[name]) for name, d in search_space.items())
