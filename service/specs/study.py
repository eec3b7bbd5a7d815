"""The study spec: what a user submits, checked as a whole before anything is stored."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Annotated, Literal, Self

from pydantic import Field, ValidationError, model_validator

from service.protocol import Resources
from service.specs.budgets import (
    check_longest_phases,
    check_no_other_budget,
    check_trunk,
    make_trunk,
)
from service.specs.processes import check_batches, check_processes
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
from warmcore.specs.fields import FieldError, reason

SamplerName = Literal["tpe", "random", "cmaes", "gp", "qmc", "grid"]
PrunerName = Literal["hyperband", "successive_halving", "median", "none"]
GPU_TOLERANCE = 1e-9


class HpoSpec(Spec):
    """The search: how many trials, how they are chosen, when they are stopped early."""

    trials: Annotated[int, Field(ge=1, le=100_000)]
    parallel: Annotated[int, Field(ge=1, le=1024)] = 1
    sampler: SamplerName = "tpe"
    pruner: PrunerName = "hyperband"
    seed: Seed = 0


class StudyResources(Spec):
    """What one trial and one target run each need."""

    trial: Resources = Resources()
    target: Resources = Resources()

    def of(self, kind: str) -> Resources:
        """What a run of this kind needs."""
        return self.target if kind == "target" else self.trial

    @model_validator(mode="after")
    def _are_shares(self) -> Self:
        """Ray counts GPUs in ten-thousandths up to one, and whole above."""
        for name, needs in (("trial", self.trial), ("target", self.target)):
            unit = 1.0 if needs.gpus > 1 else 1e-4
            if abs(needs.gpus / unit - round(needs.gpus / unit)) > GPU_TOLERANCE / unit:
                near = max(round(needs.gpus / unit), 1) * unit
                message = f"{needs.gpus} is no multiple of {unit:g}; {near:g} would work"
                raise FieldError(f"{name}.gpus", needs.gpus, message)
            check_processes(name, needs)
        return self


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
        self.with_data(self.data)  # the vocabulary that was given, if any, is not too small
        run = _made(self.trial_run, "train")
        if "warmup_fraction" in self.search_space and run.train.warmup_steps is not None:
            message = "train.warmup_steps is set, so this decides nothing; leave one of the two out"
            raise FieldError("search_space.warmup_fraction", run.train.warmup_steps, message)
        for name, dimension in self.search_space.items():
            check_dimension(name, dimension)
            for value in dimension.bounds:
                try:
                    check_size(run.with_params({name: value}))
                except ValueError as error:
                    message = f"reaches {value!r}, which {name} refuses: {reason(error)}"
                    raise FieldError(f"search_space.{name}", value, message) from None
        _check_phases(self.search_space, self.train, "search_space")
        check_batch_parts(self.search_space, self.train, "search_space.batch_size")
        check_batches("resources.trial", self.resources.trial, self.search_space, self.train)
        check_longest_phases(run, self.search_space, "search_space")
        if self.hpo.sampler == "grid":
            check_grid(self.search_space, self.hpo.trials)

    def _check_rungs(self) -> None:
        below, train = self.base_model, self.train
        for place, spec in self._places():
            below = make_grown_model(below, spec, self.warmstart, place)
            train_below, train = train, override_train(self.train, spec, place)
            check_trained_base(self.warmstart, train_below, train, place)
            tuned = {n: d for n, d in self.search_space.items() if n not in spec.train}
            _check_phases(tuned, train, f"{place}.train")
            check_batch_parts(tuned, train, f"{place}.train.accumulate")
            check_batches("resources.target", self.resources.target, tuned, train)
            try:
                run = RunSpec(model=below, data=self.data, train=train)
                check_size(run)
            except ValueError as error:
                raise FieldError(place, spec.width, reason(error)) from None
            _check_tuned(tuned, run, f"{place}.train")
            check_longest_phases(run, tuned, f"{place}.train")
            self._check_budgets(run, spec, tuned, place)

    def _check_budgets(
        self, run: RunSpec, target: TargetSpec, tuned: dict[str, Dimension], place: str
    ) -> None:
        if not target.budgets:
            return
        if self.ladder:
            message = "the rungs of a ladder have one budget each; give a target several"
            raise FieldError(f"{place}.budgets", list(target.budgets), message)
        check_no_other_budget(target.budgets, target.train, place)
        check_trunk(run, target.budgets, tuned, place)

    def _places(self) -> list[tuple[str, TargetSpec]]:
        if self.target is not None:
            return [("target", self.target)]
        return [(f"ladder.{i}", rung) for i, rung in enumerate(self.ladder)]

    @property
    def rungs(self) -> tuple[TargetSpec, ...]:
        """The targets in order of growth; the last one is what the verdict judges."""
        return tuple(spec for _, spec in self._places())

    @property
    def base_model(self) -> ModelSpec:
        """The proxy with its base width and depth settled: where every muP factor is 1."""
        base = {
            "base_width": self.proxy.base_width or self.proxy.width,
            "base_depth": self.proxy.base_depth or self.proxy.depth,
        }
        return self.proxy.for_data(self.data).model_copy(update=base)

    def rung_model(self, rung: int) -> ModelSpec:
        """The model of one rung: the proxy's shape with this width and depth."""
        return reshape_model(self.base_model, self.rungs[rung])

    def rung_train(self, rung: int) -> TrainSpec:
        """The train spec of one rung: the study's with the rung's overrides."""
        return override_train(self.train, self.rungs[rung], "target")

    def trial_run(self, seed: int) -> RunSpec:
        """A trial's run, before its parameters."""
        return RunSpec(model=self.base_model, data=self.data, train=self.train, seed=seed)

    def rung_run(self, rung: int, seed: int) -> RunSpec:
        """A target's run, before its parameters and its growth; of several budgets, the trunk."""
        model, train = self.rung_model(rung), self.rung_train(rung)
        run = RunSpec(model=model, data=self.data, train=train, seed=seed)
        return make_trunk(run, self.rungs[rung].budgets)

    @property
    def budgets(self) -> tuple[float, ...]:
        """Those of the last rung, when it has several."""
        return self.rungs[-1].budgets if self.rungs else ()

    @property
    def num_target_runs(self) -> int:
        """A warm run a rung and a cold one on the last, for each seed; a run more for a budget."""
        arms = len(self.rungs) + (1 if self.warmstart.control and self.rungs else 0)
        return arms * self.warmstart.seeds * (1 + len(self.budgets))

    def with_data(self, data: DataSpec) -> "StudySpec":
        """This study on `data`, with the vocabulary that follows from it.

        Raises:
            FieldError: the proxy was given a vocabulary that is too small.
        """
        try:
            proxy = self.proxy.for_data(data)
        except ValueError as error:
            raise FieldError("proxy.vocab_size", self.proxy.vocab_size, str(error)) from None
        return self.model_copy(update={"data": data, "proxy": proxy})

    def without_pins(self) -> "StudySpec":
        """This study on whatever its corpus and its tokenizer.json now are."""
        data = self.data.model_copy(update={"hash": None, "tokenizer_hash": None})
        return self.model_copy(update={"data": data})

    def warnings(self) -> Iterator[str]:
        """What a user should know before paying for this study."""
        for name in sorted(set(self.search_space) & set(NOT_TRANSFERABLE)):
            if self.rungs:
                yield f"search_space.{name}: not safely muTransferable: {NOT_TRANSFERABLE[name]}"
        if self.rungs and self.warmstart.control and self.warmstart.seeds == 1:
            yield "warmstart.seeds 1: a verdict from one seed has no interval; 2 or more give one"
        if self.rungs and not self.warmstart.control:
            yield "warmstart.control false: without a cold run there is no verdict"
        models = [self.base_model, *(self.rung_model(i) for i in range(len(self.rungs)))]
        for base, target in pairwise(models):
            for warning in growth_rules.warnings(self.warmstart, base, target):
                yield f"warmstart.operator: {warning}"


def _made(run: Callable[[int], RunSpec], place: str) -> RunSpec:
    try:
        return run(0)
    except ValidationError as error:
        raise FieldError(place, None, reason(error)) from None


def _check_phases(space: dict[str, Dimension], train: TrainSpec, place: str) -> None:
    """The longest warmup and the longest cooldown must fit together, for every trial."""
    phases = ("warmup_fraction", "cooldown_fraction")
    longest = {n: max(space[n].bounds) for n in phases if n in space}
    try:
        TrainSpec.model_validate(train.model_dump() | longest)
    except ValidationError as error:
        raise FieldError(place, str(longest), reason(error)) from None


def _check_tuned(space: dict[str, Dimension], run: RunSpec, place: str) -> None:
    """A target takes every value that a trial may have won with."""
    for name, dimension in space.items():
        for value in dimension.bounds:
            try:
                run.with_params({name: value})
            except ValidationError as error:
                raise FieldError(f"{place}.{name}", value, reason(error)) from None
