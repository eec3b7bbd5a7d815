"""Tables that the commands print. Rich must never parse users' text as markup."""

from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table

from service.results.schemas import BudgetResult, Costs, StudyResults, TargetRun, Verdict
from service.results.wording import (
    format_arm,
    format_difference,
    format_direction,
    format_flops,
    format_interval,
    format_nats,
    format_parameter,
    format_speedup,
    format_tokens,
    label_run,
    shared_costs,
    write_budget_prefix,
    write_headline,
)
from service.runs.schemas import CheckpointView, RunView
from service.studies.schemas import RunCounts, StudyView, TrialView

# Width of the output to a file or a pipe, which has no screen to fit.
_FILE_WIDTH = 200
_MAX_TRIALS = 50


def make_console() -> Console:
    """Return a console on stdout that prints text as it is."""
    plain = Console(markup=False, highlight=False, emoji=False)
    if not plain.is_terminal:
        plain.width = _FILE_WIDTH
    return plain


def print_parts(*parts: RenderableType) -> None:
    """Print each part below the previous part."""
    # Sentences wrap at the terminal's edge; tables shorten their columns to fit.
    out = make_console()
    for part in parts:
        out.print(part, soft_wrap=isinstance(part, str))


def _make_table(title: str, columns: str, rows: Iterable[Sequence[str]]) -> Table:
    """Return a table; `columns` holds titles, separated by `|`.

    A column with `<` before its title is aligned left, for text; other columns hold numbers.
    """
    table = Table(title=title or None, title_justify="left", box=None, pad_edge=False)
    for column in columns.split("|"):
        left = column.startswith("<")
        table.add_column(column.removeprefix("<"), justify="left" if left else "right")
    for row in rows:
        table.add_row(*row)
    return table


def _make_facts_grid(rows: Iterable[tuple[str, str]]) -> Table:
    grid = Table.grid(padding=(0, 2))
    for name, value in rows:
        if value:
            grid.add_row(name, value)
    return grid


def format_counts(runs: RunCounts) -> str:
    """Return the number of runs in each state that occurs, e.g. `1 queued, 2 leased`."""
    return ", ".join(f"{n} {state}" for state, n in runs.model_dump().items() if n) or "none yet"


def _format_params(params: dict[str, Any]) -> str:
    return "  ".join(f"{name} {format_parameter(value)}" for name, value in sorted(params.items()))


def make_studies_table(views: Iterable[StudyView]) -> Table:
    """Return a table with a row for each study."""
    rows = [
        (
            view.name,
            view.state,
            f"{view.progress:.0%}",
            format_counts(view.trials),
            format_nats(view.best_trial.val_loss_nats if view.best_trial else None),
            format_flops(view.cost_flops),
            f"{view.created_at:%Y-%m-%d %H:%M}",
        )
        for view in views
    ]
    return _make_table("", "<study|<state|done|<trials|best loss|FLOPs|<created (UTC)", rows)


def make_study_grid(view: StudyView) -> Table:
    """Return a study's facts as a grid of names and values."""
    return _make_facts_grid(
        [
            ("study", f"{view.name} ({view.id})"),
            ("state", view.state + (f": {view.reason}" if view.reason else "")),
            ("progress", f"{view.progress:.0%}"),
            ("trials", f"{format_counts(view.trials)}, of {view.trials_budget}"),
            ("targets", format_counts(view.targets) if view.spec.rungs else "none asked for"),
            ("best", _format_best_trial(view)),
            ("cost", f"{format_flops(view.cost_flops)} FLOPs"),
            *(("warning", warning) for warning in view.warnings),
        ]
    )


def _format_best_trial(view: StudyView) -> str:
    best = view.best_trial
    if best is None:
        return ""
    loss, params = format_nats(best.val_loss_nats), _format_params(best.params)
    return f"trial {best.number}: loss {loss}, {params}"


def make_trials_table(views: Sequence[TrialView]) -> Table:
    """Return a table of at most 50 trials: the best first, trials without a result last."""
    ordered = sorted(views, key=_rank_trial)[:_MAX_TRIALS]
    rows = [
        (
            str(trial.number),
            "diverged" if trial.diverged else trial.state,
            format_nats(trial.val_loss_nats),
            f"{trial.step}/{trial.num_steps}",
            _format_params(trial.params),
            _find_error_line(trial.error),
        )
        for trial in ordered
    ]
    title = "trials" if len(ordered) == len(views) else f"the best {len(ordered)} trials"
    return _make_table(title, "trial|<state|loss|step|<parameters|<error", rows)


def _find_error_line(error: str | None) -> str:
    # The last line of a traceback names the error: `ValueError: …`.
    lines = (error or "").strip().splitlines()
    return lines[-1] if lines else ""


def _rank_trial(trial: TrialView) -> tuple[bool, float, int]:
    # False sorts before True: succeeded trials first, by loss, and equal trials by number.
    loss = trial.val_loss_nats
    return trial.state != "succeeded", float("inf") if loss is None else loss, trial.number


def make_results_parts(study_results: StudyResults) -> list[RenderableType]:
    """Return the verdict and the tables behind it."""
    verdict = study_results.verdict
    sentence = verdict.sentence if verdict else f"{write_headline(None)}: {study_results.pending}."
    parts: list[RenderableType] = [write_budget_prefix(study_results) + sentence]
    if study_results.budgets:
        parts += ["", _make_budgets_table(study_results.budgets)]
    if verdict is not None:
        parts += ["", _make_pairs_table(verdict)]
    if study_results.targets:
        parts += [
            "",
            _make_targets_table(study_results.targets),
            "",
            _make_costs_table(study_results.costs),
        ]
    return parts


def _make_budgets_table(budgets: Iterable[BudgetResult]) -> Table:
    rows = [
        (
            f"{budget.tokens_per_param:g}",
            format_tokens(budget.num_tokens),
            format_difference(budget.verdict),
            format_interval(budget.verdict),
            format_speedup(budget.verdict.speedup) if budget.verdict else "-",
            format_flops(budget.costs.warm_flops),
            format_flops(budget.costs.cold_flops),
            budget.pending or write_headline(budget.verdict),
        )
        for budget in budgets
    ]
    columns = "tpp|tokens|warm - cold|95 % interval|speedup|warm FLOPs|cold FLOPs|<verdict"
    return _make_table("by budget (tokens per parameter; a run on its own)", columns, rows)


def _make_pairs_table(verdict: Verdict) -> Table:
    rows = [
        (
            str(pair.seed_number),
            format_nats(pair.warm_loss_nats),
            format_nats(pair.cold_loss_nats),
            format_direction(pair.difference_nats),
            format_tokens(pair.tokens_to_cold_loss),
            "-" if pair.speedup is None else format_speedup(pair.speedup),
        )
        for pair in verdict.pairs
    ]
    columns = "seed|warm loss|cold loss|<warm is|tokens to cold's loss|speedup"
    return _make_table("warm against cold (nats/token)", columns, rows)


def _make_targets_table(runs: Iterable[TargetRun]) -> Table:
    rows = [
        (
            run.run_id,
            format_arm(run),
            str(run.rung),
            str(run.seed_number),
            "diverged" if run.diverged else run.state,
            format_nats(run.val_loss_nats),
            format_tokens(run.tokens),
            format_flops(run.cost_flops),
            (run.base_hash or "")[:12],
        )
        for run in runs
    ]
    columns = "<run|<arm|rung|seed|<state|loss|tokens|FLOPs|<grown from"
    return _make_table("target runs", columns, rows)


def _make_costs_table(costs: Costs) -> Table:
    """Return a table of the costs, with the base and the search counted and not counted."""
    rows = [
        ("one warm run, the base sunk", format_flops(costs.warm_flops)),
        ("one warm run, the base counted", format_flops(costs.warm_base_counted_flops)),
        ("one cold run", format_flops(costs.cold_flops)),
        ("the base (the best trial)", format_flops(costs.base_flops)),
        ("the search (all trials)", format_flops(costs.search_flops)),
        *((name, format_flops(cost)) for name, cost in shared_costs(costs)),
        ("everything", format_flops(costs.total_flops)),
    ]
    return _make_table("costs", "<what|FLOPs", rows)


def make_run_parts(view: RunView, checkpoints: Sequence[CheckpointView]) -> list[RenderableType]:
    """Return a run's facts, and a table of its kept checkpoints."""
    facts = _make_facts_grid(
        [
            ("run", f"{view.id}, {label_run(view)}, of {view.study_name}"),
            ("state", view.state),
            ("progress", f"step {view.step}/{view.num_steps}, {format_tokens(view.tokens)} tokens"),
            ("validation", f"{format_nats(view.val_loss_nats)} nats/token"),
            ("training", f"{format_nats(view.loss_nats)} nats/token"),
            ("speed", f"{format_tokens(view.tokens_per_second)} tokens/s"),
            ("parameters", _format_params(view.params)),
            ("attempt", f"{view.attempt}, {view.failures} failed of {view.max_attempts}"),
            ("worker", view.worker or ""),
            ("grown from", view.base_hash or ""),
            ("branch of", view.trunk_id or ""),
            ("cost", f"{format_flops(view.cost_flops)} FLOPs"),
            ("error", view.error or ""),
        ]
    )
    rows = [(str(c.step), c.hash[:12], f"{c.num_bytes:,}", c.uri) for c in checkpoints]
    table = _make_table("checkpoints", "step|<hash|bytes|<place", rows)
    return [facts, "", table] if rows else [facts]
