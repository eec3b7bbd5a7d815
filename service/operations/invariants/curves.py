"""Curves: whole, as far as whoever trained the run can be held to it.

Our workers measure every `log_every` steps and wherever they evaluate, and say with `code_hash`
that they are ours. A worker of another framework reports what it likes, and promises nothing.
"""

from collections.abc import Iterator
from typing import Any

from sqlalchemy import Row, text
from sqlalchemy.orm import Session

from service.operations.invariants.rules import Violation
from warmcore.specs import RunSpec

_ENDED = """
SELECT r.study_id, r.id, r.state, r.spec, r.num_steps,
       array_agg(m.step ORDER BY m.step) AS steps,
       array_agg(m.evaluation ORDER BY m.step) AS evaluations,
       EXISTS (
           SELECT FROM warmscale.events e WHERE e.run_id = r.id AND e.type = 'run.checkpoint'
           AND (e.payload ->> 'step')::bigint = r.num_steps
       ) AS is_saved
FROM warmscale.runs r LEFT JOIN warmscale.measurements m ON m.run_id = r.id
WHERE r.finished_at IS NOT NULL AND r.provenance ->> 'code_hash' IS NOT NULL
GROUP BY r.id
"""
_SHOWN = 5


def find_violations(session: Session) -> Iterator[Violation]:
    """Gaps, points that should not be, evaluations amiss, and ends without a checkpoint."""
    for row in session.execute(text(_ENDED).execution_options(yield_per=100)):
        for seen in _faults(row):
            yield Violation(
                invariant="curves-whole", study_id=row.study_id, run_id=row.id, seen=seen
            )


def _faults(row: Row[Any]) -> Iterator[str]:
    spec = RunSpec.model_validate(row.spec)
    found = {s: e for s, e in zip(row.steps, row.evaluations, strict=True) if s is not None}
    is_whole = row.state == "succeeded"
    last = row.num_steps if is_whole else max(found, default=0)
    expected = {step: n for step, n in expected_points(spec, row.num_steps).items() if step <= last}
    if missing := sorted(set(expected) - set(found)):
        yield f"no measurement at {_some(missing)} of {last} steps"
    if surplus := sorted(set(found) - set(expected)):
        yield f"measurements at {_some(surplus)}, where none are made"
    # A run that ends at an evaluation, pruned or diverged, may have reported its step alone.
    wrong = [s for s in sorted(set(found) & set(expected)) if found[s] != expected[s]]
    if wrong := [step for step in wrong if is_whole or step < last]:
        named = [f"{found[s]} for {expected[s]} at step {s}" for s in wrong[:_SHOWN]]
        yield f"evaluation {', '.join(named)}"
    if is_whole and not row.is_saved:
        yield f"succeeded without a checkpoint of its last step {row.num_steps}"


def expected_points(spec: RunSpec, num_steps: int) -> dict[int, int | None]:
    """Which evaluation, if any, our workers report at each step that they measure.

    A branch begins where it left its trunk, and its points with it. Number 0, before the first
    step, is no evaluation that a pruner hears of.
    """
    start = spec.start_step
    logged = range(start - start % spec.train.log_every, num_steps + 1, spec.train.log_every)
    points: dict[int, int | None] = dict.fromkeys(step for step in logged if step > start)
    for number, step in enumerate(spec.evaluation_steps):
        if step > start or spec.trunk is None:
            points[step] = number or None
    return points


def _some(steps: list[int]) -> str:
    shown = ", ".join(map(str, steps[:_SHOWN]))
    return f"step {shown}" + (f" and {len(steps) - _SHOWN} more" if len(steps) > _SHOWN else "")
