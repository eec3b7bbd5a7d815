"""Settings of an attempt that the worker decides; the spec holds the settings of the user."""

import dataclasses
import time

from warmcore.training.ranks import ALONE, Ranks


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttemptOptions:
    """How a worker runs an attempt: how often it saves, how long it waits, and on which device."""

    checkpoint_seconds: float = 30.0
    store_patience_seconds: float = 600.0  # as in processes.single
    device: str = "cpu"
    num_threads: int = 1
    ranks: Ranks = ALONE
    leased_at: float = dataclasses.field(default_factory=time.time)
