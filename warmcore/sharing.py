"""Whether several processes can share a run (torch-free)."""

from warmcore.spec import Strategy, TrainSpec


def check_shared(train: TrainSpec, processes: int, strategy: Strategy) -> None:
    """Raise ValueError unless every process gets as many rows, and the optimizer what it needs."""
    if processes == 1:
        return
    unit = processes * train.accumulate
    if train.batch_size % unit:
        below = train.batch_size // unit * unit
        works = " or ".join(str(n) for n in (below, below + unit) if n)
        parts = f" x accumulate {train.accumulate}" if train.accumulate > 1 else ""
        raise ValueError(
            f"batch_size {train.batch_size} is no multiple of {processes} processes{parts}; "
            f"{works} would work"
        )
    if train.compile:
        raise ValueError(f"compile true is for one process, not {processes}; set compile to false")
    if strategy == "fsdp" and train.optimizer == "muon":
        raise ValueError(
            "optimizer muon needs whole matrices, and strategy fsdp shards them; "
            "strategy ddp would work, or optimizer adamw"
        )
