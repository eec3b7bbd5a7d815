"""A client that records the accepted messages."""

from service.client import Client
from service.protocol import (
    CheckpointReply,
    CheckpointReport,
    FinishReply,
    FinishRequest,
    Lease,
    Measurement,
    MeasurementBatch,
    ReportReply,
)


class Spy(Client):
    """A client that records accepted messages in order, without refused or lost messages."""

    def __init__(self, url: str, key: str) -> None:
        super().__init__(url, key, patience_seconds=20)
        self.curve: list[Measurement] = []
        self.checkpoints: list[CheckpointReport] = []
        self.steps_at_checkpoint: list[set[int]] = []
        self.finished: FinishRequest | None = None

    @property
    def losses(self) -> dict[int, float | None]:
        return {point.step: point.loss_nats for point in self.curve}

    def report(self, lease: Lease, batch: MeasurementBatch) -> ReportReply:
        reply = super().report(lease, batch)
        self.curve += batch.measurements
        return reply

    def publish(self, lease: Lease, checkpoint: CheckpointReport) -> CheckpointReply:
        before = {point.step for point in self.curve}
        reply = super().publish(lease, checkpoint)
        self.checkpoints.append(checkpoint)
        self.steps_at_checkpoint.append(before)
        return reply

    def finish(self, lease: Lease, finish: FinishRequest) -> FinishReply:
        reply = super().finish(lease, finish)
        self.finished = finish
        return reply
