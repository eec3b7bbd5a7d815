"""A worker without a training: a test leases, reports and finishes by its methods."""

import asyncio
from dataclasses import replace

from sqlalchemy.orm import Session

from service.access.caller import Caller
from service.events.wakeups import Wakeups
from service.leases.queue import LeaseQueue
from service.leases.services import LeaseServices
from service.optuna_bridge import finish_trial
from service.optuna_bridge.draft_storage import write_drafts
from service.optuna_bridge.sampler import Suggestion
from service.protocol import (
    CheckpointReport,
    FinishRequest,
    LeaseRequest,
    Measurement,
    MeasurementBatch,
    Resources,
)
from service.web.services import find_service
from service.web.shutdown import Shutdown

# The caller for tests that call a store directly, without a route.
EVERYWHERE = Caller(key_id="key", scopes=frozenset(), project=None)


class Worker:
    """A worker that leases, reports and finishes when a test calls it."""

    def __init__(self, client, name="by-hand"):
        self.client, self.name = client, name

    def lease(self, n=1, cpus=64, gpus=0.0, **more):
        resources = Resources(cpus=cpus, gpus=gpus)
        request = LeaseRequest(worker=self.name, max_runs=n, resources=resources, **more)
        return self.client.lease(request)

    def lease_one(self, **more):
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


def forget_presence(api):
    """Let the API act like a process that has just started, after an outage of unknown length."""
    find_service(api.app, LeaseServices).presence._last_request = None


def run_with_queue(api, scene, **settings):
    """Run `scene` with a separate lease queue, on a new event loop."""
    services = find_service(api.app, LeaseServices)
    services = replace(services, settings=services.settings.model_copy(update=settings))
    wakeups = Wakeups(api.engine.url)

    async def listen_and_run():
        async with wakeups.keep_listening():
            return await scene(LeaseQueue(services, wakeups, Shutdown()))

    return asyncio.run(listen_and_run())


def start_trial(sampler, study, spec):
    """Start Optuna's next trial as a lease does, without a run."""
    drawn = sampler.sample_trials(study, spec)
    with Session(sampler.engine) as session, session.begin():
        write_drafts(session, drawn)
    (draft,) = drawn.drafts
    return Suggestion(number=draft.number, params=draft.params)


def end_trial(sampler, study, number, state, value=None):
    """End a trial in Optuna as a finish does, without a run."""
    diverged = state == "diverged"
    end = finish_trial.trial_end(state, diverged=diverged)
    with Session(sampler.engine) as session, session.begin():
        return finish_trial.finish_trial(
            session, study, number, end, value=value, diverged=diverged
        )


def report_losses(sampler, study, number, losses):
    """Report validation losses to Optuna; `losses` maps an evaluation number to a loss."""
    storage = sampler.storage
    trial = storage.get_trial_id_from_study_id_trial_number(
        storage.get_study_id_from_name(study), number
    )
    for evaluation, loss in losses.items():
        storage.set_trial_intermediate_value(trial, evaluation, loss)
