"""The report's section on the warm and the cold arm: curves, pairs, target runs and costs."""

from collections.abc import Mapping, Sequence

from service.results.report.markup import (
    Column,
    error_columns,
    render_plot,
    render_section,
    render_table,
)
from service.results.report.plotting import Figure, display_state
from service.results.schemas import Costs, SeedPair, StudyResults, TargetRun
from service.results.wording import (
    format_arm,
    format_direction,
    format_flops,
    format_nats,
    format_speedup,
    format_tokens,
    shared_costs,
)

_NOTE = (
    "Each pair trains the same target with the same budget, data order and seed: the warm run "
    "grows from the best trial's checkpoint, the cold run starts from a fresh initialization. "
    "Tokens are on a logarithmic axis."
)
_PAIR_COLUMNS: tuple[Column[SeedPair], ...] = (
    Column(title="seed", text=lambda p: str(p.seed_number)),
    Column(title="warm loss", text=lambda p: format_nats(p.warm_loss_nats)),
    Column(title="cold loss", text=lambda p: format_nats(p.cold_loss_nats)),
    Column(title="warm is", text=lambda p: format_direction(p.difference_nats)),
    Column(title="tokens to cold's loss", text=lambda p: format_tokens(p.tokens_to_cold_loss)),
    Column(title="speedup", text=lambda p: format_speedup(p.speedup)),
)


def render_arm_section(results: StudyResults, figures: Mapping[str, Figure]) -> str:
    """Return the section, or nothing while the study has no target run."""
    curves = render_plot("arms", "Validation loss", shape="tall") if "arms" in figures else ""
    differences = (
        render_plot("differences", "Difference: left of 0, warm is better", shape="low")
        if "differences" in figures
        else ""
    )
    pairs = results.verdict.pairs if results.verdict else ()
    note = _NOTE
    if results.budgets:
        budget = f"{results.budgets[-1].tokens_per_param:g}"
        note += f" The pairs are those at {budget} tokens per parameter."
    targets, costs = results.targets, _render_costs(results.costs)
    return render_section(
        "Warm against cold",
        note if targets else "",
        curves,
        render_table(_PAIR_COLUMNS, pairs) if pairs else "",
        render_table(_target_columns(targets), targets) if targets else "",
        f'<div class="figures">{differences}{costs}</div>' if targets else "",
    )


def _target_columns(runs: Sequence[TargetRun]) -> list[Column[TargetRun]]:
    rung: Column[TargetRun] = Column(title="rung", text=lambda r: str(r.rung))
    return [
        Column(title="target run", text=lambda r: r.run_id, kind="code"),
        Column(title="arm", text=format_arm, kind="text"),
        *([rung] if any(r.rung for r in runs) else []),
        Column(title="seed", text=lambda r: str(r.seed_number)),
        Column(title="state", text=display_state, kind="state"),
        Column(title="loss", text=lambda r: format_nats(r.val_loss_nats)),
        *_average_columns(runs),
        Column(title="tokens", text=lambda r: format_tokens(r.tokens)),
        Column(title="FLOPs", text=lambda r: format_flops(r.cost_flops)),
        Column(title="grown from", text=lambda r: (r.base_hash or "")[:12], kind="code"),
        *error_columns(runs),
    ]


def _average_columns(runs: Sequence[TargetRun]) -> list[Column[TargetRun]]:
    """Return columns of the newest loss of averaged weights, if any run keeps an average."""

    def newest(run: TargetRun, field: str) -> float | None:
        return getattr(run.curve[-1], field) if run.curve else None

    fields = {"EMA loss": "ema_val_loss_nats", "SWA loss": "swa_val_loss_nats"}
    # `field=field` binds the name of this round: a closure would read the last name in all columns.
    return [
        Column(title=title, text=lambda run, field=field: format_nats(newest(run, field)))
        for title, field in fields.items()
        if any(newest(run, field) is not None for run in runs)
    ]


def _render_costs(costs: Costs) -> str:
    rows = [
        ("one warm run, the base sunk", costs.warm_flops),
        ("one warm run, the base counted", costs.warm_base_counted_flops),
        ("one cold run", costs.cold_flops),
        ("the base: the best trial's own training", costs.base_flops),
        ("the search: all trials", costs.search_flops),
        *shared_costs(costs),
        ("all runs of this study", costs.total_flops),
    ]
    columns: tuple[Column[tuple[str, float | None]], ...] = (
        Column(title="cost", text=lambda row: row[0], kind="text"),
        Column(title="FLOPs", text=lambda row: format_flops(row[1])),
    )
    return render_table(columns, rows)
