"""The study spec that a user submits; it is checked as a whole before it is stored."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Annotated, Literal, Self

from pydantic import Field, ValidationError, model_validator

from service.specs.budgets import (
    check_longest_phases,
    check_no_other_budget,
    check_trunk,
    make_trunk,
)
from service.specs.processes import StudyResources, check_batches
from service.specs.search_space import Dimension, check_batch_parts, check_dimension, check_grid
from service.specs.target import (
    TargetSpec,
    WarmstartSpec,
    check_size,
    check_trained_base,
    make_grown_model,
    override_train,
    reshape_model,
)
from warmcore.specs import (
    NOT_TRANSFERABLE,
    DataSpec,
    ModelSpec,
    RunSpec,
    Seed,
    Spec,
    TrainSpec,
    growth_rules,
)
from warmcore.specs.fields import FieldError, format_reason

SamplerName = Literal["tpe", "random", "cmaes", "gp", "qmc", "grid"]
PrunerName = Literal["hyperband", "successive_halving", "median", "none"]


class HpoSpec(Spec):
    """The search: the number of trials, their sampler, and the pruner that stops poor trials."""

    trials: Annotated[int, Field(ge=1, le=100_000)]
    parallel: Annotated[int, Field(ge=1, le=1024)] = 1
    sampler: SamplerName = "tpe"
    pruner: PrunerName = "hyperband"
    seed: Seed = 0


class StudySpec(Spec):
    """A study, as submitted in YAML or JSON."""

    name: str = Field(min_length=1, max_length=200, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    data: DataSpec
    proxy: ModelSpec
    target: TargetSpec | None = None
    ladder: Annotated[tuple[TargetSpec, ...], Field(max_length=16)] = ()
    train: TrainSpec = TrainSpec()
    search_space: dict[str, Dimension]
    hpo: HpoSpec
    warmstart: WarmstartSpec = WarmstartSpec()
    resources: StudyResources = StudyResources()
    max_attempts: Annotated[int, Field(ge=1, le=100)] = 3

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if self.target is not None and self.ladder:
            raise FieldError(
                "ladder", len(self.ladder), "target and ladder exclude each other; give one"
            )
        if not self.search_space:
            raise FieldError("search_space", {}, "empty; give at least one dimension, e.g. lr")
        self._check_search_space()
        self._check_rungs()
        return self

    def _check_search_space(self) -> None:
        self.with_data(self.data)  # raises if the proxy's vocabulary is too small
        run = _make_or_fail(self.trial_run, "train")
        if "warmup_fraction" in self.search_space and run.train.warmup_steps is not None:
            message = "train.warmup_steps is set, so this decides nothing; leave one of the two out"
            raise FieldError("search_space.warmup_fraction", run.train.warmup_steps, message)
        for name, dimension in self.search_space.items():
            check_dimension(name, dimension)
            for value in dimension.bounds:
                try:
                    check_size(run.with_params({name: value}))
                except ValueError as error:
                    message = f"reaches {value!r}; {name} refuses it: {format_reason(error)}"
                    raise FieldError(f"search_space.{name}", value, message) from None
        # Each bound was checked alone; these checks are of bounds that only together cannot be
        # trained.
        _check_phases(self.search_space, self.train, "search_space")
        check_batch_parts(self.search_space, self.train, "search_space.batch_size")
        check_batches("resources.trial", self.resources.trial, self.search_space, self.train)
        check_longest_phases(run, self.search_space, "search_space")
        if self.hpo.sampler == "grid":
            check_grid(self.search_space, self.hpo.trials)

    def _check_rungs(self) -> None:
        # A rung is checked with every value that a trial may win with, at submission: a search that
        # ends in a target that cannot be trained would be lost.
        below, train = self.base_model, self.train
        for prefix, spec in self._list_rungs():
            below = make_grown_model(below, spec, self.warmstart, prefix)
            train_below, train = train, override_train(self.train, spec, prefix)
            check_trained_base(self.warmstart, train_below, train, prefix)
            tuned = {n: d for n, d in self.search_space.items() if n not in spec.train}
            _check_phases(tuned, train, f"{prefix}.train")
            check_batch_parts(tuned, train, f"{prefix}.train.accumulate")
            check_batches("resources.target", self.resources.target, tuned, train)
            try:
                run = RunSpec(model=below, data=self.data, train=train)
                check_size(run)
            except ValueError as error:
                raise FieldError(prefix, spec.width, format_reason(error)) from None
            _check_tuned(tuned, run, f"{prefix}.train")
            check_longest_phases(run, tuned, f"{prefix}.train")
            self._check_budgets(run, spec, tuned, prefix)

    def _check_budgets(
        self, run: RunSpec, target: TargetSpec, tuned: dict[str, Dimension], prefix: str
    ) -> None:
        if not target.budgets:
            return
        if self.ladder:
            message = "the rungs of a ladder have one budget each; give a target several"
            raise FieldError(f"{prefix}.budgets", list(target.budgets), message)
        check_no_other_budget(target.budgets, target.train, prefix)
        check_trunk(run, target.budgets, tuned, prefix)

    def _list_rungs(self) -> list[tuple[str, TargetSpec]]:
        """Return the path and the spec of each target."""
        if self.target is not None:
            return [("target", self.target)]
        return [(f"ladder.{i}", rung) for i, rung in enumerate(self.ladder)]

    @property
    def rungs(self) -> tuple[TargetSpec, ...]:
        """The targets in order of growth; the verdict compares runs of the last."""
        return tuple(spec for _, spec in self._list_rungs())

    @property
    def base_model(self) -> ModelSpec:
        """The proxy with its base width and depth, at which every muP factor is 1."""
        # muP scales by width / base_width: settled here, a target keeps its proxy as base.
        base = {
            "base_width": self.proxy.base_width or self.proxy.width,
            "base_depth": self.proxy.base_depth or self.proxy.depth,
        }
        return self.proxy.for_data(self.data).model_copy(update=base)

    def rung_model(self, rung: int) -> ModelSpec:
        """Return the model of a rung: the proxy's shape with the rung's width and depth."""
        return reshape_model(self.base_model, self.rungs[rung])

    def rung_train(self, rung: int) -> TrainSpec:
        """Return the train spec of a rung: the study's with the rung's overrides."""
        return override_train(self.train, self.rungs[rung], "target")

    def trial_run(self, seed: int) -> RunSpec:
        """Return a trial's run without its parameters."""
        return RunSpec(model=self.base_model, data=self.data, train=self.train, seed=seed)

    def rung_run(self, rung: int, seed: int) -> RunSpec:
        """Return a target's run, or its trunk, without its parameters and its growth."""
        model, train = self.rung_model(rung), self.rung_train(rung)
        run = RunSpec(model=model, data=self.data, train=train, seed=seed)
        return make_trunk(run, self.rungs[rung].budgets)

    @property
    def budgets(self) -> tuple[float, ...]:
        """The token budgets of the last rung, if it has several."""
        return self.rungs[-1].budgets if self.rungs else ()

    @property
    def num_target_runs(self) -> int:
        """The number of target runs that the study starts by itself."""
        # Example: a target with control, 2 seeds and 3 budgets has 2 arms, hence 4 trunks with 3
        # cooldowns each: 16 runs.
        arms = len(self.rungs) + (1 if self.warmstart.control and self.rungs else 0)
        return arms * self.warmstart.seeds * (1 + len(self.budgets))

    def with_data(self, data: DataSpec) -> "StudySpec":
        """Return this study on `data`, with the vocabulary that follows from it.

        Raises:
            FieldError: the proxy was given a vocabulary that is too small.
        """
        try:
            proxy = self.proxy.for_data(data)
        except ValueError as error:
            raise FieldError("proxy.vocab_size", self.proxy.vocab_size, str(error)) from None
        return self.model_copy(update={"data": data, "proxy": proxy})

    def without_pins(self) -> "StudySpec":
        """Return this study without the hashes of its corpus and its tokenizer.json."""
        data = self.data.model_copy(update={"hash": None, "tokenizer_hash": None})
        return self.model_copy(update={"data": data})

    def find_warnings(self) -> Iterator[str]:
        """Yield weaknesses of the study that a user should know before it is paid for."""
        for name in sorted(set(self.search_space) & set(NOT_TRANSFERABLE)):
            if self.rungs:
                yield f"search_space.{name}: not safely muTransferable: {NOT_TRANSFERABLE[name]}"
        if self.rungs and self.warmstart.control and self.warmstart.seeds == 1:
            yield "warmstart.seeds 1: a verdict from one seed has no interval; 2 or more give one"
        if self.rungs and not self.warmstart.control:
            yield "warmstart.control false: without a cold run there is no verdict"
        models = [self.base_model, *(self.rung_model(i) for i in range(len(self.rungs)))]
        for base, target in pairwise(models):
            for warning in growth_rules.find_warnings(self.warmstart, base, target):
                yield f"warmstart.operator: {warning}"


def _make_or_fail(make_run: Callable[[int], RunSpec], prefix: str) -> RunSpec:
    """Return a run, or raise its validation error as a FieldError for `prefix`."""
    try:
        return make_run(0)
    except ValidationError as error:
        raise FieldError(prefix, None, format_reason(error)) from None


def _check_phases(space: dict[str, Dimension], train: TrainSpec, prefix: str) -> None:
    """Raise a FieldError unless the longest warmup and the longest cooldown fit together."""
    phases = ("warmup_fraction", "cooldown_fraction")
    longest = {n: max(space[n].bounds) for n in phases if n in space}
    try:
        TrainSpec.model_validate(train.model_dump() | longest)
    except ValidationError as error:
        raise FieldError(prefix, str(longest), format_reason(error)) from None


def _check_tuned(space: dict[str, Dimension], run: RunSpec, prefix: str) -> None:
    """Raise a FieldError unless the target accepts every value that a trial may win with."""
    for name, dimension in space.items():
        for value in dimension.bounds:
            try:
                run.with_params({name: value})
            except ValidationError as error:
                raise FieldError(f"{prefix}.{name}", value, format_reason(error)) from None
