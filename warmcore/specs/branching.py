"""One constant phase cooled down at several token budgets (METHOD §4; arXiv 2405.18392).

A WSD run of N steps begins to cool down at t0 = N - ceil(c N). Until there its learning rate does
not depend on N, if its warmup is the same number of steps. So runs of several budgets are one run
up to the smallest t0, all but one of them up to the next, and so on: the trunk, whose warmup is
that of the largest budget. Each budget's branch goes on from the trunk's checkpoint at its own t0
and is, from there, the run of that budget without a trunk, bit for bit on a CPU.
"""

from collections.abc import Sequence

from warmcore.specs.run import RunSpec


def past_evaluations(
    branch: RunSpec, trunk: RunSpec, losses_nats: Sequence[float]
) -> tuple[float, ...]:
    """Those of the trunk's losses that the branch would have measured itself."""
    own = frozenset(branch.evaluation_steps)
    by_step = zip(trunk.evaluation_steps, losses_nats, strict=False)
    return tuple(loss for step, loss in by_step if step in own)
