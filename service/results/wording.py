"""A verdict in plain sentences, and the formats of the numbers in tables and reports."""

from service.lifecycle import FINAL_RUN_STATES, FINAL_STUDY_STATES
from service.results.schemas import Costs, Interval, SeedPair, StudyResults, TargetRun, Verdict
from service.runs.schemas import RunView
from service.specs.study import StudySpec
from service.studies.schemas import RunCounts

_LARGE = 1e6


def write_sentence(verdict: Verdict, costs: Costs, warm_diverged: tuple[int, ...] = ()) -> str:
    """Return a verdict's sentence: finding, certainty, speed, cost and the runs not compared."""
    clauses = [
        _write_finding(verdict, warm_diverged),
        _write_speed(verdict.pairs, verdict.speedup),
        _write_cost(costs),
        _write_left_out(verdict.left_out),
    ]
    return "; ".join(clause for clause in clauses if clause) + "."


def _write_finding(verdict: Verdict, warm_diverged: tuple[int, ...]) -> str:
    ended = f"warm ended {format_direction(verdict.difference_nats)} than cold"
    seeds, interval = count_seeds(verdict.seeds), verdict.interval_nats
    if interval is None:
        return f"Not shown at 1 seed: {ended}, but one seed has no interval and may be chance"
    # A run that diverged has no loss, so no interval can outweigh it.
    if warm_diverged:
        numbers = ", ".join(str(seed) for seed in warm_diverged)
        runs = f"run of seed {numbers}" if len(warm_diverged) == 1 else f"runs of seeds {numbers}"
        return f"Not shown: the warm {runs} diverged; over the other {seeds} {ended}"
    if interval.low <= 0 <= interval.high:
        return (
            f"Not shown at {seeds}: {ended} on average, but the {_format_span(interval)} includes 0"
        )
    return f"{write_headline(verdict)}: over {seeds} {ended} ({_format_span(interval)})"


def format_nats(loss: float | None) -> str:
    """Return a loss, or a dash."""
    return "-" if loss is None else format_digits(loss)


def format_digits(value: float, sign: str = "") -> str:
    """Return a number with four decimals, or with four digits from a million on."""
    return f"{value:{sign}.4f}" if abs(value) < _LARGE else f"{value:{sign}.4g}"


def format_flops(count: float | None) -> str:
    """Return FLOPs as `1.23e+12`, or a dash."""
    return "-" if count is None else f"{count:.2e}"


def format_tokens(count: float | None) -> str:
    """Return a number of tokens with thousands marked, or a dash."""
    return "-" if count is None else f"{count:,.0f}"


def format_parameter(value: object) -> str:
    """Return a parameter's value, a float with four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def format_speedup(value: float | None) -> str:
    """Return a speedup as `1.20x`, or `never` where warm did not reach cold's loss."""
    return "never" if value is None else f"{value:.2f}x"


def format_difference(verdict: Verdict | None) -> str:
    """Return the mean of warm - cold with its sign, or a dash."""
    return "-" if verdict is None else format_digits(verdict.difference_nats, "+")


def format_interval(verdict: Verdict | None) -> str:
    """Return the interval of warm - cold, or a dash."""
    if verdict is None or verdict.interval_nats is None:
        return "-"
    return format_ends(verdict.interval_nats)


def format_arm(run: TargetRun) -> str:
    """Return the arm of a target run: `warm`, `warm trunk`, or `warm at 20 tpp` for a branch."""
    if run.is_trunk:
        return f"{run.arm} trunk"
    return run.arm if run.budget is None else f"{run.arm} at {run.budget:g} tpp"


def label_run(run: RunView) -> str:
    """Return a run's label: `trial 3`, `target warm`, or `target warm at 20 tpp`."""
    if run.kind == "trial":
        return f"trial {run.trial_number}"
    if run.spec.branches:
        return f"target {run.arm} trunk"
    budget = f" at {run.spec.train.tokens_per_param:g} tpp" if run.branch else ""
    return f"target {run.arm}{budget}"


def shared_costs(costs: Costs) -> list[tuple[str, float | None]]:
    """Return two rows that show the saving by shared trunks; none where nothing is shared."""
    if costs.targets_flops == costs.targets_alone_flops:
        return []
    return [
        ("all target runs, trunks shared", costs.targets_flops),
        ("the same without sharing", costs.targets_alone_flops),
    ]


def write_budget_prefix(results: StudyResults) -> str:
    """Return `At 20 tokens per parameter: `, the judged budget, where there are several."""
    if not results.budgets:
        return ""
    return f"At {results.budgets[-1].tokens_per_param:g} tokens per parameter: "


def write_headline(verdict: Verdict | None) -> str:
    """Return the verdict in a few words."""
    if verdict is None:
        return "No verdict yet"
    if verdict.grow:
        return "Growing paid"
    worse = verdict.interval_nats is not None and verdict.interval_nats.low > 0
    return "Growing did not pay" if worse else "Not shown"


def format_direction(difference_nats: float) -> str:
    """Return a signed difference in words: `0.0123 nats lower`."""
    direction = "lower" if difference_nats < 0 else "higher"
    return f"{format_digits(abs(difference_nats))} nats {direction}"


def format_ends(interval: Interval) -> str:
    """Return the two ends of an interval: `-1.0585 to -0.9315`."""
    return f"{format_digits(interval.low, '+')} to {format_digits(interval.high, '+')}"


def count_seeds(seeds: int) -> str:
    """Return `1 seed`, `2 seeds`."""
    return f"{seeds} seed" if seeds == 1 else f"{seeds} seeds"


def _format_span(interval: Interval) -> str:
    return f"{interval.confidence:.0%} interval {format_ends(interval)} nats"


def _write_speed(pairs: tuple[SeedPair, ...], speedup: float | None) -> str:
    if speedup is not None:
        # A speedup of 1.2 is 1 / 1.2 = 83 % of the tokens.
        share = f"{1 / speedup:.0%}"
        return f"warm reached cold's final loss with {share} of cold's tokens ({speedup:.2f}x)"
    reached = sum(p.speedup is not None for p in pairs)
    if reached == 0:
        return "warm never reached cold's final loss"
    return f"warm reached cold's final loss in {reached} of {len(pairs)} seeds"


def _write_cost(costs: Costs) -> str:
    if costs.warm_flops is None or costs.cold_flops is None:
        return ""
    counted = costs.warm_base_counted_flops
    warm, cold = format_flops(costs.warm_flops), format_flops(costs.cold_flops)
    base = "" if counted is None else f" ({format_flops(counted)} with the base counted)"
    return f"a warm run costs {warm} FLOPs{base}, a cold run {cold}"


def _write_left_out(left_out: tuple[str, ...]) -> str:
    return f"not compared: {', '.join(left_out)}" if left_out else ""


def explain_missing_target(
    spec: StudySpec, state: str, reason: str | None, trials: RunCounts
) -> str:
    """Return the reason why a study has no target run to judge."""
    if not spec.rungs:
        return "the study has no target; it runs trials only"
    if state in FINAL_STUDY_STATES:
        return f"the study is {state}; its target never started" + (f": {reason}" if reason else "")
    done = sum(getattr(trials, final) for final in FINAL_RUN_STATES)
    return f"{done} of {spec.hpo.trials} trials are finished; the target starts after the last"
