"""A worker that trains nothing: it leases, reports and finishes as a test tells it."""

from service.caller import Caller
from service.protocol import (
    CheckpointReport,
    FinishRequest,
    LeaseRequest,
    Measurement,
    MeasurementBatch,
    Resources,
)

# What a store takes for the one who asks, where a test calls it without a route.
EVERYWHERE = Caller(key_id="key", scopes=frozenset(), project=None)


class Worker:
    """Leases, reports and finishes by hand."""

    def __init__(self, client, name="by-hand"):
        self.client, self.name = client, name

    def lease(self, n=1, cpus=64, gpus=0.0, **more):
        resources = Resources(cpus=cpus, gpus=gpus)
        request = LeaseRequest(worker=self.name, max_runs=n, resources=resources, **more)
        return self.client.lease(request)

    def one(self, **more):
        (lease,) = self.lease(1, **more)
        return lease

    def report(self, lease, *points):
        batch = MeasurementBatch(measurements=[Measurement(**p) for p in points])
        return self.client.report(lease, batch).decision

    def evaluate(self, lease, evaluation, loss):
        step = evaluation * 5
        point = {
            "step": step,
            "tokens": step * 256,
            "val_loss_nats": loss,
            "evaluation": evaluation,
        }
        return self.report(lease, point)

    def publish(self, lease, step=20, final=True, **more):
        fields = {
            "step": step,
            "tokens": step * 256,
            "uri": f"{lease.artifact_uri}/step-{step:08d}",
            "hash": f"{hash((lease.run_id, step)) % 2**64:064x}",
            "num_bytes": 1,
            "final": final,
        }
        return self.client.publish(lease, CheckpointReport.model_validate(fields | more))

    def finish(self, lease, outcome="succeeded", loss=2.0, **more):
        loss = loss if outcome in ("succeeded", "pruned") else None
        request = FinishRequest(outcome=outcome, val_loss_nats=loss, **more)
        return self.client.finish(lease, request).state

    def complete(self, lease, loss=2.0):
        self.publish(lease)
        return self.finish(lease, loss=loss)
