"""Whether the processes that a study asks for can share its runs."""

from service.protocol import Resources
from service.specs.search_space import Dimension, IntDimension
from warmcore.specs import TrainSpec
from warmcore.specs.fields import FieldError
from warmcore.specs.train import check_shared


def check_processes(place: str, needs: Resources) -> None:
    """Raise a FieldError below `place` unless every process gets as much: a GPU, or whole CPUs."""
    size, gpus = needs.num_processes, needs.gpus
    if gpus and size != max(1, int(gpus)):
        works = f"processes {max(1, int(gpus))} would work, or gpus {size}"
        message = f"{size} with gpus {gpus:g}: every process takes one GPU; {works}"
        raise FieldError(f"{place}.processes", size, message)
    is_short = gpus and needs.cpus < size  # processes that wait for their GPUs may share a CPU
    if needs.cpus % size and not is_short:
        below = needs.cpus // size * size
        works = " or ".join(str(n) for n in (below, below + size) if n)
        message = f"{needs.cpus} is no multiple of {size} processes; {works} would work"
        raise FieldError(f"{place}.cpus", needs.cpus, message)


def check_batches(
    place: str, needs: Resources, space: dict[str, Dimension], train: TrainSpec
) -> None:
    """Raise a FieldError below `place` unless every batch that may be tried has equal parts."""
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
            check_shared(tried, needs.num_processes, needs.strategy)
        except ValueError as error:
            path = f"{place}.processes"
            raise FieldError(path, needs.num_processes, f"{error}{hint}") from None
