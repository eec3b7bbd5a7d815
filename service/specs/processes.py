"""The resources of a study's runs, and checks that their processes can share them."""

from typing import Self

from pydantic import model_validator

from service.protocol import Resources
from service.specs.search_space import Dimension, IntDimension
from warmcore.specs import Spec, TrainSpec
from warmcore.specs.fields import FieldError
from warmcore.specs.train import check_parallel_training

GPU_TOLERANCE = 1e-9  # of a unit: 0.1 is not exact in floating point


class StudyResources(Spec):
    """The resources of one trial and of one target run."""

    trial: Resources = Resources()
    target: Resources = Resources()

    def needs_of(self, kind: str) -> Resources:
        """Return the resources of a run of this kind."""
        return self.target if kind == "target" else self.trial

    @model_validator(mode="after")
    def _are_shares(self) -> Self:
        """Check the GPUs: Ray counts them in ten-thousandths up to 1, and in whole GPUs above."""
        for name, needs in (("trial", self.trial), ("target", self.target)):
            unit = 1.0 if needs.gpus > 1 else 1e-4
            if abs(needs.gpus / unit - round(needs.gpus / unit)) > GPU_TOLERANCE / unit:
                near = max(round(needs.gpus / unit), 1) * unit
                message = f"{needs.gpus} is not a multiple of {unit:g}; {near:g} would work"
                raise FieldError(f"{name}.gpus", needs.gpus, message)
            check_processes(name, needs)
        return self


def check_processes(prefix: str, needs: Resources) -> None:
    """Raise a FieldError below `prefix` unless every process gets one GPU or equally many CPUs."""
    size, gpus = needs.num_processes, needs.gpus
    if gpus and size != max(1, int(gpus)):
        works = f"processes {max(1, int(gpus))} would work, or gpus {size}"
        message = f"{size} with gpus {gpus:g}: every process takes one GPU; {works}"
        raise FieldError(f"{prefix}.processes", size, message)
    # Processes with GPUs mostly wait for them: they may share a CPU.
    is_short = gpus and needs.cpus < size
    if needs.cpus % size and not is_short:
        below = needs.cpus // size * size
        works = " or ".join(str(n) for n in (below, below + size) if n)
        message = f"{needs.cpus} is not a multiple of {size} processes; {works} would work"
        raise FieldError(f"{prefix}.cpus", needs.cpus, message)


def check_batches(
    prefix: str, needs: Resources, space: dict[str, Dimension], train: TrainSpec
) -> None:
    """Raise a FieldError below `prefix` unless the processes share every batch size equally."""
    # For a range it is enough to check `low` and `low + step`: if the number of processes divides
    # both, it divides every value. Example: 4 processes, low 8, step 4 gives 8, 12, 16.
    sizes, hint = [train.batch_size], ""
    dimension = space.get("batch_size")
    if isinstance(dimension, IntDimension):
        sizes = [dimension.low, dimension.low + (dimension.step or 1)]
        hint = "; search_space.batch_size needs low and step of that kind, or type categorical"
    elif dimension is not None:
        sizes = [int(size) for size in dimension.bounds]
    for batch_size in sizes:
        tried = train.model_copy(update={"batch_size": batch_size})
        try:
            check_parallel_training(tried, needs.num_processes, needs.strategy)
        except ValueError as error:
            path = f"{prefix}.processes"
            raise FieldError(path, needs.num_processes, f"{error}{hint}") from None
