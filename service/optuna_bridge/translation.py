"""Translation of a study's spec to Optuna: distributions, sampler and pruner.

Every trial gets a new sampler object with a seed derived from the study's seed and the number of
trials. Therefore replicas and restarts never sample the same trial twice. Grid and QMC need one
seed for the whole study; they keep their position in the storage.
"""

from typing import Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.pruners import (
    BasePruner,
    HyperbandPruner,
    MedianPruner,
    NopPruner,
    SuccessiveHalvingPruner,
)
from optuna.samplers import (
    BaseSampler,
    CmaEsSampler,
    GPSampler,
    GridSampler,
    QMCSampler,
    RandomSampler,
    TPESampler,
)
from optuna.trial import Trial

from service.specs.search_space import (
    CategoricalDimension,
    Dimension,
    FloatDimension,
    list_grid_points,
)
from service.specs.study import StudySpec
from warmcore.specs import derive_seed


def make_distribution(dimension: Dimension) -> BaseDistribution:
    """Return Optuna's distribution for a dimension of the search space."""
    if isinstance(dimension, CategoricalDimension):
        return CategoricalDistribution(dimension.choices)
    if isinstance(dimension, FloatDimension):
        return FloatDistribution(
            dimension.low, dimension.high, log=dimension.log, step=dimension.step
        )
    return IntDistribution(
        dimension.low, dimension.high, log=dimension.log, step=dimension.step or 1
    )


def suggest_params(trial: Trial, spec: StudySpec) -> dict[str, Any]:
    """Sample every parameter of the search space, in the order of the spec."""
    return {name: _suggest_param(trial, name, dim) for name, dim in spec.search_space.items()}


def _suggest_param(trial: Trial, name: str, dimension: Dimension) -> Any:
    if isinstance(dimension, CategoricalDimension):
        return trial.suggest_categorical(name, dimension.choices)
    if isinstance(dimension, FloatDimension):
        low, high = dimension.low, dimension.high
        return trial.suggest_float(name, low, high, log=dimension.log, step=dimension.step)
    step = dimension.step or 1
    return trial.suggest_int(name, dimension.low, dimension.high, log=dimension.log, step=step)


def make_sampler(spec: StudySpec, trials_so_far: int) -> BaseSampler:
    """Return a new sampler for the study's next trial."""
    seed = spec.hpo.seed % 2**32
    draw = derive_seed(spec.hpo.seed, "ask", trials_so_far) % 2**32
    match spec.hpo.sampler:
        case "random":
            return RandomSampler(seed=draw)
        case "tpe":
            # The first third of the trials, at most 10, is random: TPE needs trials to compare.
            # `constant_liar` counts running trials as bad, so parallel trials differ.
            startup = min(10, max(1, spec.hpo.trials // 3))
            return TPESampler(n_startup_trials=startup, constant_liar=True, seed=draw)
        case "cmaes":
            return CmaEsSampler(seed=draw, warn_independent_sampling=False)
        case "gp":
            startup = min(10, max(1, spec.hpo.trials // 3))
            return GPSampler(n_startup_trials=startup, seed=draw)
        case "qmc":
            return QMCSampler(seed=seed, scramble=True, warn_independent_sampling=False)
        case "grid":
            points = {name: list(list_grid_points(dim)) for name, dim in spec.search_space.items()}
            return GridSampler(points, seed=seed)


def make_pruner(spec: StudySpec) -> BasePruner:
    """Return the study's pruner; its resource is the number of the evaluation."""
    evaluations = spec.train.evaluations
    match spec.hpo.pruner:
        case "none":
            return NopPruner()
        case "median":
            startup = min(5, max(1, spec.hpo.trials // 4))
            return MedianPruner(n_startup_trials=startup, n_warmup_steps=2)
        case "successive_halving":
            return SuccessiveHalvingPruner(min_resource=1, reduction_factor=3)
        case "hyperband":
            return HyperbandPruner(min_resource=1, max_resource=evaluations, reduction_factor=3)
