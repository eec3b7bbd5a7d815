"""The rule on curves: complete, as far as the worker that trained the run has promised.

Our workers measure every `log_every` steps and at each evaluation. They identify themselves with
`provenance.code_hash`. A worker of another framework may report any points and promises nothing:
the rule skips its runs.
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
_MAX_NAMED = 5


def find_violations(session: Session) -> Iterator[Violation]:
    """Yield gaps, surplus points, wrong evaluations, and ends without a checkpoint."""
    for row in session.execute(text(_ENDED).execution_options(yield_per=100)):
        for seen in _find_faults(row):
            yield Violation(
                invariant="curves-whole", study_id=row.study_id, run_id=row.id, seen=seen
            )


# For example 20 steps, `log_every` 10 and 4 evaluations: a run that succeeded has the points 0, 5,
# 10, 15 and 20. A run pruned at step 10 has 0, 5 and 10: only points up to its last measurement are
# expected. A point at step 7 is surplus in both.
def _find_faults(row: Row[Any]) -> Iterator[str]:
    spec = RunSpec.model_validate(row.spec)
    found = {s: e for s, e in zip(row.steps, row.evaluations, strict=True) if s is not None}
    is_complete = row.state == "succeeded"
    last = row.num_steps if is_complete else max(found, default=0)
    expected = {step: n for step, n in expected_points(spec, row.num_steps).items() if step <= last}
    if missing := sorted(set(expected) - set(found)):
        yield f"there is no measurement at {_format_steps(missing)}, though the run reached {last}"
    if surplus := sorted(set(found) - set(expected)):
        yield f"there are measurements at {_format_steps(surplus)}, where our workers make none"
    # A run that is pruned or diverges at an evaluation may report its last step without it.
    wrong = [s for s in sorted(set(found) & set(expected)) if found[s] != expected[s]]
    if wrong := [step for step in wrong if is_complete or step < last]:
        named = [f"{found[s]} instead of {expected[s]} at step {s}" for s in wrong[:_MAX_NAMED]]
        yield f"the number of the evaluation is {', '.join(named)}"
    if is_complete and not row.is_saved:
        yield f"the run succeeded without a checkpoint of its last step {row.num_steps}"


def expected_points(spec: RunSpec, num_steps: int) -> dict[int, int | None]:
    """Return the steps that our workers measure, each with the number of its evaluation or None.

    The points of a branch begin at the step at which it left its trunk. The evaluation before the
    first step has number 0 and counts as None: the pruner does not get it.
    """
    start = spec.start_step
    logged = range(start - start % spec.train.log_every, num_steps + 1, spec.train.log_every)
    points: dict[int, int | None] = dict.fromkeys(step for step in logged if step > start)
    for number, step in enumerate(spec.evaluation_steps):
        if step > start or spec.trunk is None:
            points[step] = number or None
    return points


def _format_steps(steps: list[int]) -> str:
    named = ", ".join(map(str, steps[:_MAX_NAMED]))
    rest = len(steps) - _MAX_NAMED
    return f"step {named}" + (f" and {rest} more" if rest > 0 else "")
