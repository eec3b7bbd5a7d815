"""The messages that runs are read by."""

from datetime import datetime
from typing import Any

from pydantic import Field

from service.protocol import CheckpointView, Measurement, Message, RunView


class RunPage(Message):
    """A page of runs; pass `next_cursor` as `cursor` for the next."""

    items: tuple[RunView, ...]
    next_cursor: str | None


class MeasurementView(Measurement):
    """A point of a curve and the attempt that reported it."""

    attempt: int


class MeasurementPage(Message):
    """A page of a run's curve, by step; pass `next_cursor` as `cursor` for the next."""

    items: tuple[MeasurementView, ...]
    next_cursor: str | None


class CheckpointList(Message):
    """A run's checkpoints that are kept, newest first."""

    items: tuple[CheckpointView, ...]


class EventView(Message):
    """A transition."""

    id: int
    study_id: str | None
    run_id: str | None
    type: str
    actor: str | None = Field(
        description="who did it: a key's id; `operator`, on the database itself; `service`"
    )
    attempt: int | None
    payload: dict[str, Any]
    created_at: datetime
