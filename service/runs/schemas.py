"""The messages of the routes that read runs."""

from service.protocol import CheckpointView, Measurement, Message, RunView


class RunPage(Message):
    """A page of runs; pass `next_cursor` as `cursor` for the next."""

    items: tuple[RunView, ...]
    next_cursor: str | None


class MeasurementView(Measurement):
    """A point of a curve, and the attempt that reported it."""

    attempt: int


class MeasurementPage(Message):
    """A page of a run's curve, by step; pass `next_cursor` as `cursor` for the next."""

    items: tuple[MeasurementView, ...]
    next_cursor: str | None


class CheckpointList(Message):
    """A run's checkpoints that are kept, newest first."""

    items: tuple[CheckpointView, ...]
