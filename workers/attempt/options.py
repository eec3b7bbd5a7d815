"""Settings of an attempt that the worker decides; the spec holds the settings of the user."""

import dataclasses
import time

from warmcore.training.ranks import ALONE, Ranks


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttemptOptions:
    """Settings of an attempt: times between checkpoints, patience with the store, and devices."""

    checkpoint_seconds: float = 30.0
    store_patience_seconds: float = 600.0  # equals PATIENCE_SECONDS in workers.processes.single
    device: str = "cpu"
    num_threads: int = 1
    ranks: Ranks = ALONE
    leased_at: float = dataclasses.field(default_factory=time.time)
